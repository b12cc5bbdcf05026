"""A whole call under either plan: rows left out, reductions, labels, buffers for gradients.

`autograd` and `custom_ops` wrap these three functions for eager and for compiled code. The loops
and the arithmetic are in `execute`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.workspace import on_huge_pages
from esr_kernels.divergence.execute import (
    Call,
    Gradients,
    Operands,
    forward_only,
    recompute_gradients,
    stash,
)
from esr_kernels.divergence.statistics import IGNORED_LABEL, RowsKnown, RowStats

# The label of a row whose class lies on another rank.
_OTHER_RANK = -1
# (loss, the [T] fields of `LinearDivergence`).
Outputs = tuple[Tensor, ...]
Wanted = tuple[bool, bool, bool]  # gradients of student hidden, weight, bias


def stash_forward(
    call: Call, active: Tensor | None, row_weight: Tensor | None, operands: Operands, wanted: Wanted
) -> tuple[Outputs, Gradients]:
    """Outputs and the gradients of the loss, for an upstream factor of 1.

    `active` [n] int64 are the rows to compute, None for all; the others have weight 0.
    """
    whole = operands.take(active, row_weight)
    gradients = _new_gradients(wanted, whole, call)
    x = whole.over(slice(0, call.classes))
    weights, factor = _row_weights(row_weight, active, x, call)
    with matmul.plain_precision(x.student_hidden):
        shared = _shared(gradients, x, call)
        values, stats = stash(x, weights, factor * call.spec.student.slope, call, shared)
        outputs = _outputs(values, x, stats, weights, factor, call)
    tokens = operands.student_hidden.shape[0]
    hidden = None if gradients.hidden is None else _spread(gradients.hidden, active, tokens)
    bias = _bias_gradient(gradients.bias, operands)
    return _spread_outputs(outputs, call, active, tokens), Gradients(hidden, gradients.weight, bias)


def recompute_forward(
    call: Call, active: Tensor | None, row_weight: Tensor | None, operands: Operands
) -> tuple[Outputs, RowsKnown]:
    """Outputs and the few floats of every token that `recompute_backward` wants."""
    x = operands.take(active, row_weight).over(slice(0, call.classes))
    weights, factor = _row_weights(row_weight, active, x, call)
    with matmul.plain_precision(x.student_hidden):
        values, stats, known = forward_only(x, call)
        outputs = _outputs(values, x, stats, weights, factor, call)
    tokens = operands.student_hidden.shape[0]
    kept = RowsKnown(*(_spread(field, active, tokens) for field in known))
    return _spread_outputs(outputs, call, active, tokens), kept


def recompute_backward(
    call: Call,
    active: Tensor | None,
    row_weight: Tensor | None,
    operands: Operands,
    known: RowsKnown,
    upstream: Tensor,
    wanted: Wanted,
    weight_grad: Tensor | None = None,
) -> Gradients:
    """Gradients of sum(upstream * loss). The head's is added to `weight_grad` where that is given.

    `upstream` is a scalar, or [T] with reduction "none".
    """
    whole = operands.take(active, row_weight)
    adds = weight_grad is not None
    gradients = _new_gradients((wanted[0], wanted[1] and not adds, wanted[2]), whole, call)
    x = whole.over(slice(0, call.classes))
    weights, factor = _row_weights(row_weight, active, x, call)
    rows = RowsKnown(*(_of(field, active) for field in known))
    scale = upstream if upstream.dim() == 0 else _of(upstream, active)
    scale = (scale * (factor * call.spec.student.slope)).to(rows.student_lse.dtype)
    scale = scale.expand_as(rows.student_lse)
    if weights is not None:
        scale = scale * weights
    shared = _shared(gradients._replace(weight=weight_grad) if adds else gradients, x, call)
    with matmul.plain_precision(x.student_hidden):
        recompute_gradients(x, call, rows, scale.contiguous(), shared, add_weight=adds)
    tokens = operands.student_hidden.shape[0]
    hidden = None if gradients.hidden is None else _spread(gradients.hidden, active, tokens)
    return Gradients(hidden, gradients.weight, _bias_gradient(gradients.bias, operands))


def active_rows(token_weights: Tensor | None, compact: bool) -> Tensor | None:
    """Indices of the rows of weight other than 0, or None for all rows.

    Looks at the weights, which stalls a GPU: `compact` is by default where they are on the CPU.
    """
    if token_weights is None or not compact:
        return None
    live = token_weights != 0
    return None if bool(live.all()) else live.nonzero()[:, 0]


def _of(rows: Tensor, active: Tensor | None) -> Tensor:
    return rows if active is None else rows[active]


def _spread(rows: Tensor, active: Tensor | None, tokens: int) -> Tensor:
    """Rows back at their places among all tokens, the others 0."""
    if active is None:
        return rows
    return rows.new_zeros(tokens, *rows.shape[1:]).index_copy_(0, active, rows)


def _spread_outputs(outputs: Outputs, call: Call, active: Tensor | None, tokens: int) -> Outputs:
    return tuple(_spread(x, active, tokens) if x.dim() else x for x in outputs)


def _new_gradients(wanted: Wanted, x: Operands, call: Call) -> Gradients:
    """Buffers for the gradients of the student's operands."""
    dtype = matmul.logits_dtype(x.student_hidden.dtype)
    hidden = torch.empty_like(x.student_hidden) if wanted[0] else None
    weight = bias = None
    if wanted[1]:
        # What is added to the caller's fp32 memory must not be rounded before.
        given = call.plan.problem.weight_grad_given
        weight = torch.empty_like(x.student_weight, dtype=dtype if given else None)
        weight = on_huge_pages(weight)
        # Rows of the head that the models do not share.
        weight[0 if x.student_ids is not None else call.classes :].zero_()
    if wanted[2]:
        bias = torch.zeros(call.classes, dtype=dtype, device=x.student_hidden.device)
    return Gradients(hidden, weight, bias)


def _shared(gradients: Gradients, x: Operands, call: Call) -> Gradients:
    """The part of the buffers that belongs to shared classes."""
    if x.student_ids is not None or gradients.weight is None:
        return gradients
    return gradients._replace(weight=gradients.weight[: call.classes])


def _bias_gradient(gradient: Tensor | None, operands: Operands) -> Tensor | None:
    bias = operands.student_bias
    return None if gradient is None or bias is None else gradient.to(bias.dtype)


def _cross_entropy(x: Operands, stats: RowStats, call: Call) -> Tensor:
    """-log p(label) [T]; 0 where there is no label. The label's logit is one dot product a row."""
    if x.labels is None:
        return torch.zeros_like(stats.student_lse)
    dtype = stats.student_lse.dtype
    here = (x.labels >= 0) & (x.labels < call.classes)
    label = torch.where(here, x.labels, 0)
    row = label if x.student_ids is None else x.student_ids[label]
    logit = (x.student_hidden.to(dtype) * x.student_weight[row].to(dtype)).sum(1)
    if x.student_bias is not None:
        logit = logit + x.student_bias[label]
    transform = call.spec.student
    if transform.softcap is None:
        logit = logit * transform.slope
    else:
        logit = torch.tanh(logit * (transform.scale / transform.softcap))
        logit = logit * (transform.softcap / transform.temperature)
    logit = torch.where(here, logit, 0)
    if call.group is not None:
        dist.all_reduce(logit, group=call.group)
    entropy = torch.where(x.labels != IGNORED_LABEL, stats.student_lse - logit, 0)
    # Of a label that is no class, which nobody looked for on a GPU.
    wrong = (x.labels >= call.classes) | ((x.labels < 0) & (x.labels != IGNORED_LABEL))
    if call.group is not None:
        wrong = wrong & (x.labels != _OTHER_RANK)
    return torch.where(wrong, torch.nan, entropy)


def _row_weights(
    row_weight: Tensor | None, active: Tensor | None, x: Operands, call: Call
) -> tuple[Tensor | None, float]:
    """(row weights or None for 1, common factor): the loss is factor * sum(weight * divergence).

    Scaling dz before it is rounded, rather than the gradients afterwards, spares them a rounding.
    """
    if row_weight is not None:
        row_weight = _of(row_weight, active)
    if call.reduction != "mean":
        return row_weight, 1.0
    if row_weight is None:
        return None, 1.0 / max(x.student_hidden.shape[0], 1)
    total = row_weight.sum()
    return row_weight / torch.where(total == 0, torch.ones_like(total), total), 1.0


def _loss(rows: Tensor, row_weight: Tensor | None, factor: float, reduction: str) -> Tensor:
    if row_weight is not None:
        rows = torch.where(row_weight != 0, row_weight * rows, 0)
    return rows if reduction == "none" else rows.sum() * factor


def _outputs(
    values: Tensor,
    x: Operands,
    stats: RowStats,
    row_weight: Tensor | None,
    factor: float,
    call: Call,
) -> tuple[Tensor, ...]:
    """(loss, the [T] fields of LinearDivergence)."""
    cross_entropy = _cross_entropy(x, stats, call)
    rows = values
    if x.labels is not None and call.spec.label_weight:  # 0 times an infinite one would be NaN
        rows = values + call.spec.label_weight * cross_entropy
    loss = _loss(rows, row_weight, factor, call.reduction)
    fields: tuple[Tensor, ...] = (
        values,
        cross_entropy,
        stats.student_entropy,
        stats.teacher_entropy,
        stats.student_lse,
        stats.teacher_lse,
        stats.agreement,
    )
    if row_weight is not None:
        fields = tuple(torch.where(row_weight != 0, field, 0) for field in fields)
    elif loss is values:
        fields = (values.clone(), *fields[1:])
    return loss, *fields
