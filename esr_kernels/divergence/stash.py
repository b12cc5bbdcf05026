"""Plan "stash": four matrix products, the fewest possible.

Tokens are processed in chunks. Both models' logits of a chunk exist in memory; one pass computes
their statistics, one writes dz, the gradient of the student's logits, over them, and two products
turn dz into the gradients of hidden states and head. When the forward ends, the gradients
are complete for an upstream factor of 1; the backward only scales them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.rows import spread_rows
from esr_kernels.common.workspace import borrow_rows, row_stride
from esr_kernels.divergence.call import (
    Call,
    Gradients,
    Operands,
    Outputs,
    Wanted,
    accumulator,
    finish,
    new_gradients,
    row_range,
    scaled_to_fp16,
)
from esr_kernels.divergence.merged import MergedClass, merged_class
from esr_kernels.divergence.outputs import cross_entropy, outputs, spread_outputs
from esr_kernels.divergence.plan import padded_tokens
from esr_kernels.divergence.statistics import RowStats, Tile


def stash_forward(
    call: Call, active: Tensor | None, row_weight: Tensor | None, operands: Operands, wanted: Wanted
) -> tuple[Outputs, Gradients]:
    """Outputs, and the gradients of the loss for an upstream factor of 1.

    `active` [n] int64 are the rows to compute, None for all; the others have weight 0.
    """
    tokens = operands.student_hidden.shape[0]
    whole = operands.take(active, row_weight)
    gradients = new_gradients(wanted, whole, call)
    x = whole.shared(call.classes)
    weights, factor = call.row_weights(row_weight, active, x.student_hidden.shape[0])
    with matmul.plain_precision(x.student_hidden):
        merged = None if call.merge is None else merged_class(whole, x, call)
        rest = x if merged is None else merged.rest
        slope = call.spec.student.slope
        values, stats = _run_chunks(rest, merged, weights, factor * slope, call, gradients)
        entropy_of = cross_entropy if merged is None else merged.cross_entropy
        label_entropy = None if x.labels is None else entropy_of(x, stats, call)
        of_active = outputs(values, stats, label_entropy, weights, factor, call)
    if gradients.hidden is not None and active is not None:
        gradients = gradients._replace(hidden=spread_rows(gradients.hidden, active, tokens))
    return spread_outputs(of_active, active, tokens), gradients.in_dtype_of(operands)


def _run_chunks(
    x: Operands,
    merged: MergedClass | None,
    row_weight: Tensor | None,
    factor: float,
    call: Call,
    gradients: Gradients,
) -> tuple[Tensor, RowStats]:
    """Divergence [T] and statistics of every row.

    Fills the gradients of factor * sum(row_weight * (divergence + label_weight * cross-entropy)).
    """
    plan, dtype = call.plan, matmul.logits_dtype(x.student_hidden.dtype)
    tokens = x.student_hidden.shape[0]
    restore = None
    if x.student_hidden.dtype == torch.float16:
        row_weight, restore = scaled_to_fp16(row_weight, x.student_hidden)
    weight = gradients.over_shared_classes(x, call.classes).weight
    buffers = _Buffers(x, call, weight)
    hidden_sum = accumulator(gradients.hidden, wide=plan.sums_hidden_apart)
    weight_sum = accumulator(weight, wide=plan.sums_weight_apart)
    results: list[tuple[Tensor, RowStats]] = []
    for start in range(0, tokens, plan.token_chunk):
        stop = min(start + plan.token_chunk, tokens)
        hidden = row_range(x.student_hidden, start, stop)
        dz = row_range(buffers.dz, 0, stop - start)
        if buffers.student is None:
            matmul.project(hidden, x.student_weight, dz, x.student_ids)
        for first in range(start, stop, plan.logit_chunk):
            last = min(first + plan.logit_chunk, stop)
            rows = slice(first, last)
            t = row_range(buffers.teacher, 0, last - first)
            h = row_range(x.teacher_hidden, first, last)
            matmul.project(h, x.teacher_weight, t, x.teacher_ids)
            dz_rows = row_range(dz, first - start, last - start)
            s = dz_rows
            if buffers.student is not None:
                s = row_range(buffers.student, 0, last - first)
                h = row_range(x.student_hidden, first, last)
                matmul.project(h, x.student_weight, s, x.student_ids)
            labels = None if x.labels is None else x.labels[rows]
            tile = Tile(s, t, x.student_bias, x.teacher_bias, labels)
            tile_weight = None if row_weight is None else row_weight[rows]
            if merged is None:
                value, stat = call.rows.stash_rows_(tile, tile_weight, call.spec, dz_rows)
            else:
                value, stat = merged.stash_rows_(call, tile, tile_weight, dz_rows, rows)
            results.append((value, stat))
        if hidden_sum is not None:
            out = row_range(hidden_sum, start, stop)
            matmul.hidden_gradient(
                dz, x.student_weight, out, x.student_ids, alpha=factor, accumulate=False
            )
        if weight_sum is not None:
            matmul.weight_gradient(
                dz, hidden, weight_sum, x.student_ids, alpha=factor, accumulate=start > 0
            )
        if gradients.bias is not None:
            gradients.add_to_bias(x, slice(0, call.classes), dz.sum(0, dtype=dtype), factor)
    if not results and weight_sum is not None:
        weight_sum.zero_()
    if merged is not None and hidden_sum is not None:
        merged.add_hidden_gradient(hidden_sum, factor)
    if merged is not None and gradients.bias is not None:
        merged.add_bias_gradient(gradients.bias, factor)
    finish(gradients.hidden, hidden_sum, restore)
    finish(weight, weight_sum, restore)
    finish(gradients.bias, gradients.bias, restore)
    if merged is not None and gradients.weight is not None:
        merged.set_weight_gradient(x.student_hidden, gradients.weight, factor, restore, add=False)
    return _all_rows(results, x.student_hidden)


def _all_rows(results: list[tuple[Tensor, RowStats]], like: Tensor) -> tuple[Tensor, RowStats]:
    """(divergence, statistics) of the rows of all chunks, which come in order."""
    if len(results) == 1:
        return results[0]
    # One launch a chunk and one in all, rather than one for each of eleven fields.
    chunks = [torch.stack((value, *stats)) for value, stats in results]
    if not chunks:
        dtype = matmul.logits_dtype(like.dtype)
        chunks = [like.new_empty(1 + len(RowStats._fields), 0, dtype=dtype)]
    value, *stats = torch.cat(chunks, dim=1).unbind()
    return value, RowStats(*stats)


class _Buffers:
    """Buffers for the logits of a chunk. A dz of their dtype replaces the student's logits."""

    def __init__(self, x: Operands, call: Call, weight_gradient: Tensor | None) -> None:
        plan, dtype = call.plan, matmul.logits_dtype(x.student_hidden.dtype)
        in_place = plan.problem.in_place
        # As a plan made for more tokens has them, or fewer.
        most = padded_tokens(x.student_hidden.shape[0], plan.problem.device)
        self.device, self.classes = x.student_hidden.device, call.classes
        height = min(plan.logit_chunk, most)
        dz_dtype = dtype if in_place else x.student_hidden.dtype
        self.dz = self._rows("dz", min(plan.token_chunk, most), dz_dtype)
        self.student = None if in_place else self._rows("student", height, dtype)
        if plan.teacher_in_gradient and weight_gradient is not None:
            per_logit = dtype.itemsize // weight_gradient.dtype.itemsize
            row = row_stride(call.classes)
            idle = weight_gradient
            if per_logit > 1:
                idle = idle.view(-1)[: height * row * per_logit].view(dtype)
            # From where `idle` starts: its storage may start before.
            self.teacher = idle.as_strided((height, call.classes), (row, 1))
        else:
            self.teacher = self._rows("teacher", height, dtype)

    def _rows(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        return borrow_rows(name, (rows, self.classes), self.device, dtype)
