"""The two autograd functions of `linear_divergence`, one for each plan, and what they share.

Both return (loss, the [T] fields of `LinearDivergence`) and give gradients to the student's hidden
states, head and bias. The arithmetic is in `execute`; here are reductions, labels and buffers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from esr_kernels import gemm
from esr_kernels.execute import (
    Call,
    Gradients,
    Operands,
    forward_only,
    recompute_gradients,
    stash,
)
from esr_kernels.row_stats import IGNORED_LABEL, RowsKnown, RowStats


def _new_gradients(wanted: tuple[bool, ...], x: Operands, classes: int) -> Gradients:
    """Buffers for the gradients of the first three operands."""
    hidden = torch.empty_like(x.student_hidden) if wanted[0] else None
    weight = torch.empty_like(x.student_weight) if wanted[1] else None
    bias = None
    if wanted[2]:
        dtype = gemm.logits_dtype(x.student_hidden.dtype)
        bias = torch.zeros(classes, dtype=dtype, device=x.student_hidden.device)
    if weight is not None:
        # Rows of the head that the models do not share.
        weight[0 if x.student_ids is not None else classes :].zero_()
    return Gradients(hidden, weight, bias)


def _shared(gradients: Gradients, x: Operands, classes: int) -> Gradients:
    """The part of the buffers that belongs to shared classes."""
    if x.student_ids is not None or gradients.weight is None:
        return gradients
    return gradients._replace(weight=gradients.weight[:classes])


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
    return torch.where(x.labels != IGNORED_LABEL, stats.student_lse - logit, 0)


def _normalised(
    row_weight: Tensor | None, tokens: int, reduction: str
) -> tuple[Tensor | None, float]:
    """(row weights or None for 1, common factor): the loss is factor * sum(weight * divergence).

    Scaling dz before it is rounded, rather than the gradients afterwards, spares them a rounding.
    """
    if reduction != "mean":
        return row_weight, 1.0
    if row_weight is None:
        return None, 1.0 / max(tokens, 1)
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
    rows = values if x.labels is None else values + call.spec.label_weight * cross_entropy
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


def _refuse_double_backward() -> None:
    # Autograd turns gradients on in a backward only for create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence has no double backward (create_graph=True); "
            "use impl='reference' for second derivatives"
        )


def _plain_precision(like: Tensor) -> torch.autocast:
    """Autocast off: the operands were cast at the boundary, and logits stay fp32 from there on."""
    return torch.autocast(like.device.type, enabled=False)


class StashFunction(torch.autograd.Function):
    """Gradient in the forward pass; the backward scales it by the upstream scalar."""

    @staticmethod
    def forward(ctx, call, row_weight, *operands):  # type: ignore[no-untyped-def]
        whole = Operands(*operands)
        gradients = _new_gradients(ctx.needs_input_grad[2:5], whole, call.classes)
        x = whole.over(slice(0, call.classes))
        row_weight, factor = _normalised(row_weight, x.student_hidden.shape[0], call.reduction)
        with _plain_precision(x.student_hidden):
            slope = call.spec.student.slope
            values, stats = stash(
                x, row_weight, factor * slope, call, _shared(gradients, x, call.classes)
            )
            loss, *fields = _outputs(values, x, stats, row_weight, factor, call)
        ctx.save_for_backward(*gradients)
        ctx.bias_dtype = None if x.student_bias is None else x.student_bias.dtype
        ctx.spent = False
        ctx.mark_non_differentiable(*fields)
        ctx.set_materialize_grads(False)
        return loss, *fields

    @staticmethod
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        if upstream is None:
            return (None,) * _INPUTS
        _refuse_double_backward()
        if ctx.spent:
            raise RuntimeError(
                "linear_divergence with plan='stash' supports one backward pass: its gradient was "
                "scaled in place. Use plan='recompute' to backward twice through one graph"
            )
        ctx.spent = True
        gradients = ctx.saved_tensors
        # Reading the factor would stall a GPU; on CPU it spares a pass over the weight gradient.
        if upstream.device.type == "cuda" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return _input_gradients(Gradients(*gradients), ctx.bias_dtype)


class RecomputeFunction(torch.autograd.Function):
    """A few floats a token in between; the backward projects again."""

    @staticmethod
    def forward(ctx, call, row_weight, *operands):  # type: ignore[no-untyped-def]
        x = Operands(*operands).over(slice(0, call.classes))
        row_weight, factor = _normalised(row_weight, x.student_hidden.shape[0], call.reduction)
        with _plain_precision(x.student_hidden):
            values, stats, known = forward_only(x, call)
            loss, *fields = _outputs(values, x, stats, row_weight, factor, call)
        ctx.save_for_backward(
            row_weight,
            known.student_lse,
            known.teacher_lse,
            known.lse_gap,
            known.pull_sum,
            *operands,
        )
        ctx.factor, ctx.call = factor * call.spec.student.slope, call
        ctx.mark_non_differentiable(*fields)
        ctx.set_materialize_grads(False)
        return loss, *fields

    @staticmethod
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        if upstream is None:
            return (None,) * _INPUTS
        _refuse_double_backward()
        row_weight, *saved = ctx.saved_tensors
        known, whole = RowsKnown(*saved[:4]), Operands(*saved[4:])
        weights = (upstream * ctx.factor).to(known.student_lse.dtype)
        weights = weights.expand_as(known.student_lse)
        if row_weight is not None:
            weights = weights * row_weight
        gradients = _new_gradients(ctx.needs_input_grad[2:5], whole, ctx.call.classes)
        x = whole.over(slice(0, ctx.call.classes))
        with _plain_precision(x.student_hidden):
            recompute_gradients(
                x, ctx.call, known, weights.contiguous(), _shared(gradients, x, ctx.call.classes)
            )
        bias_dtype = None if x.student_bias is None else x.student_bias.dtype
        return _input_gradients(gradients, bias_dtype)


# Of the autograd functions: call, row weights, operands.
_INPUTS = 2 + len(Operands._fields)


def _input_gradients(
    gradients: Gradients, bias_dtype: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    bias = None if gradients.bias is None else gradients.bias.to(bias_dtype)
    missing = (None,) * (_INPUTS - 5)
    return None, None, gradients.hidden, gradients.weight, bias, *missing
