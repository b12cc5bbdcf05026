"""The fields of `linear_divergence`'s result, from the divergence and statistics of each row."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from esr_kernels.common.reduction import reduce_rows
from esr_kernels.common.rows import spread_rows
from esr_kernels.common.transform import transform_
from esr_kernels.divergence.call import Call, Operands, Outputs
from esr_kernels.divergence.statistics import IGNORED_LABEL, RowStats

# The label of a row whose class lies on another rank.
_OTHER_RANK = -1


def outputs(
    values: Tensor,
    stats: RowStats,
    cross_entropy: Tensor | None,
    row_weight: Tensor | None,
    factor: float,
    call: Call,
) -> Outputs:
    """(loss, the [n] fields of `LinearDivergence`) of the active rows.

    `cross_entropy` [n] is None for a call without labels.
    """
    rows = values
    if cross_entropy is None:
        cross_entropy = values.new_zeros(values.shape[0])
    if call.spec.label_weight:  # 0 times an infinite cross-entropy would be NaN
        rows = torch.add(values, cross_entropy, alpha=call.spec.label_weight)
    reduction = "none" if call.reduction == "none" else "sum"  # the weights of a mean sum to 1
    loss = reduce_rows(rows, row_weight, reduction)
    if factor != 1.0:
        loss = loss * factor
    fields: Outputs = (
        values,
        cross_entropy,
        stats.student_entropy,
        stats.teacher_entropy,
        stats.student_lse,
        stats.teacher_lse,
        stats.agreement,
    )
    if row_weight is not None:
        # Together, in one launch.
        fields = torch.where(row_weight != 0, torch.stack(fields), 0).unbind()
    elif loss is values:
        fields = (values.clone(), *fields[1:])
    return loss, *fields


def spread_outputs(of_active: Outputs, active: Tensor | None, tokens: int) -> Outputs:
    """The outputs of all rows: 0 for those that were left out."""
    if active is None:
        return of_active
    return tuple(spread_rows(x, active, tokens) if x.dim() else x for x in of_active)


def cross_entropy(x: Operands, stats: RowStats, call: Call) -> Tensor:
    """-log p(label) [n]; 0 where there is no label. The label's logit is one dot product a row."""
    assert x.labels is not None
    if call.plan.problem.rows == "triton" and call.group is None:
        from esr_kernels.divergence import merge_triton  # Triton is not installed everywhere.

        x_student = x.student_hidden, x.student_weight, x.student_bias, x.student_ids
        return merge_triton.cross_entropy(*x_student, x.labels, stats.student_lse, call.spec)
    dtype = stats.student_lse.dtype
    here = (x.labels >= 0) & (x.labels < call.classes)
    label = torch.where(here, x.labels, 0)
    row = label if x.student_ids is None else x.student_ids[label]
    logit = (x.student_hidden.to(dtype) * x.student_weight[row].to(dtype)).sum(1)
    bias = None if x.student_bias is None else x.student_bias[label]
    transform_(logit, bias, call.spec.student)
    logit = torch.where(here, logit, 0)
    if call.group is not None:
        dist.all_reduce(logit, group=call.group)
    entropy = torch.where(x.labels != IGNORED_LABEL, stats.student_lse - logit, 0)
    # Labels that are no class, which the argument checks do not see on a GPU.
    wrong = (x.labels >= call.classes) | ((x.labels < 0) & (x.labels != IGNORED_LABEL))
    if call.group is not None:
        wrong = wrong & (x.labels != _OTHER_RANK)
    return torch.where(wrong, torch.nan, entropy)
