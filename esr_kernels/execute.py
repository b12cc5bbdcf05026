"""Running a plan: the loops over chunks of tokens (stash) and tiles of classes (recompute).

Autograd, input checks and reductions live in `linear_divergence`; the arithmetic on logits in the
row passes. Here is only which GEMM feeds which pass, and into which buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels import gemm
from esr_kernels.plan import Plan
from esr_kernels.row_stats import RowSpec, RowStats, merge_parts, mixed_kl

# Buffers for the gradients of hidden [T, D], weight [V, D] and bias [V]; None where not wanted.
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Call:
    """The non-tensor side of one call."""

    spec: RowSpec
    plan: Plan
    rows: ModuleType
    classes: int
    reduction: str


class Heads(NamedTuple):
    """Operands over the shared classes and the active rows."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None

    def over(self, classes: slice) -> Heads:
        return Heads(
            self.student_hidden,
            self.student_weight[classes],
            None if self.student_bias is None else self.student_bias[classes],
            self.teacher_hidden,
            self.teacher_weight[classes],
            None if self.teacher_bias is None else self.teacher_bias[classes],
        )


def _buffer(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=like.device)


def _into_fp16_range(row_weight: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, Tensor]:
    """(row weights for dz, what restores the gradients), for fp16 operands.

    fp16 has no numbers below 6e-8, and the probabilities of a large vocabulary times the weight of
    one token among many are down there: dz is kept with weights of about 32, a power of two times
    the true ones, and the gradients, summed in fp32, are scaled back before they are rounded.
    """
    if row_weight is None:
        row_weight = torch.ones(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    largest = torch.cat([row_weight.abs(), row_weight.new_full((1,), 2.0**-100)]).amax()
    power = torch.exp2(torch.floor(torch.log2(largest)))
    return row_weight * (32.0 / power), power / 32.0


def _accumulator(gradient: Tensor | None, wide: bool) -> Tensor | None:
    """Where a gradient is summed: in fp32 if `wide`, else in place."""
    if gradient is None or not wide or gradient.dtype.itemsize >= 4:
        return gradient
    return torch.empty_like(gradient, dtype=torch.float32)


def _finish(gradient: Tensor | None, accumulator: Tensor | None, restore: Tensor | None) -> None:
    if gradient is None or accumulator is None:
        return
    if restore is not None:
        accumulator.mul_(restore)
    if accumulator is not gradient:
        gradient.copy_(accumulator)


def stash(
    heads: Heads, row_weight: Tensor | None, factor: float, call: Call, gradients: Gradients
) -> tuple[Tensor, RowStats]:
    """Divergence and statistics of every row.

    Fills the gradients of factor * sum(row_weight * divergence).
    """
    hidden_grad, weight_grad, bias_grad = gradients
    plan, dtype = call.plan, gemm.logits_dtype(heads.student_hidden.dtype)
    tokens, classes = heads.student_hidden.shape[0], call.classes
    in_place = plan.problem.in_place
    restore = None
    if heads.student_hidden.dtype == torch.float16:
        row_weight, restore = _into_fp16_range(row_weight, heads.student_hidden)
    dz_dtype = dtype if in_place else heads.student_hidden.dtype
    dz_buffer = _buffer(heads.student_hidden, min(plan.token_chunk, tokens), classes, dz_dtype)
    teacher_buffer = _buffer(heads.student_hidden, min(plan.logit_chunk, tokens), classes, dtype)
    student_buffer = None if in_place else torch.empty_like(teacher_buffer)
    hidden_sum = _accumulator(hidden_grad, restore is not None)
    weight_sum = _accumulator(weight_grad, restore is not None or plan.token_chunk < tokens)
    values, parts = [], []
    for start in range(0, tokens, plan.token_chunk):
        chunk = slice(start, min(start + plan.token_chunk, tokens))
        hidden = heads.student_hidden[chunk]
        dz = dz_buffer[: hidden.shape[0]]
        if in_place:
            gemm.project(hidden, heads.student_weight, dz)
        for first in range(chunk.start, chunk.stop, plan.logit_chunk):
            rows = slice(first, min(first + plan.logit_chunk, chunk.stop))
            inside = slice(rows.start - start, rows.stop - start)
            t = teacher_buffer[: rows.stop - rows.start]
            gemm.project(heads.teacher_hidden[rows], heads.teacher_weight, t)
            if student_buffer is None:
                s = dz[inside]
            else:
                s = student_buffer[: rows.stop - rows.start]
                gemm.project(heads.student_hidden[rows], heads.student_weight, s)
            value, stats = call.rows.stash_rows_(
                s,
                t,
                None if row_weight is None else row_weight[rows],
                call.spec,
                heads.student_bias,
                heads.teacher_bias,
                s if in_place else dz[inside],
            )
            values.append(value)
            parts.append(stats)
        if hidden_sum is not None:
            gemm.hidden_gradient(
                dz, heads.student_weight, hidden_sum[chunk], alpha=factor, accumulate=False
            )
        if weight_sum is not None:
            gemm.weight_gradient(dz, hidden, weight_sum, alpha=factor, accumulate=start > 0)
        if bias_grad is not None:
            bias_grad.add_(dz.sum(0, dtype=dtype), alpha=factor)
    if not values and weight_sum is not None:
        weight_sum.zero_()
    _finish(hidden_grad, hidden_sum, restore)
    _finish(weight_grad, weight_sum, restore)
    _finish(bias_grad, bias_grad, restore)
    return _concatenate(values, parts, heads.student_hidden, dtype)


def _concatenate(
    values: list[Tensor], stats: list[RowStats], like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, RowStats]:
    if not values:
        empty = torch.empty(0, dtype=dtype, device=like.device)
        return empty, RowStats(*[empty] * 8)
    fields = RowStats.__dataclass_fields__
    return torch.cat(values), RowStats(
        *(torch.cat([getattr(part, name) for part in stats]) for name in fields)
    )


def _tiles(call: Call) -> list[slice]:
    step = call.plan.vocab_chunk
    return [slice(at, min(at + step, call.classes)) for at in range(0, call.classes, step)]


class _TileBuffers:
    """Logits of one tile of classes for all tokens, reused from tile to tile."""

    def __init__(self, heads: Heads, call: Call) -> None:
        dtype = gemm.logits_dtype(heads.student_hidden.dtype)
        size = heads.student_hidden.shape[0] * call.plan.vocab_chunk
        self._s = torch.empty(size, dtype=dtype, device=heads.student_hidden.device)
        self._t = torch.empty_like(self._s)

    def project(self, tile: Heads) -> tuple[Tensor, Tensor]:
        shape = tile.student_hidden.shape[0], tile.student_weight.shape[0]
        s, t = (flat[: shape[0] * shape[1]].view(shape) for flat in (self._s, self._t))
        gemm.project(tile.student_hidden, tile.student_weight, s)
        gemm.project(tile.teacher_hidden, tile.teacher_weight, t)
        return s, t


def forward_only(heads: Heads, call: Call) -> tuple[Tensor, RowStats, Tensor]:
    """(divergence, statistics, sum of pulls) of every row from discarded tiles of logits."""
    buffers = _TileBuffers(heads, call)
    parts = []
    for classes in _tiles(call):
        tile = heads.over(classes)
        s, t = buffers.project(tile)
        parts.append(
            call.rows.tile_stats(
                s, t, call.spec, tile.student_bias, tile.teacher_bias, classes.start
            )
        )
    stats = merge_parts(torch.cat(parts, dim=1))
    mix = call.spec.divergence.kl_weights
    if mix is not None:
        value, pull_sum = mixed_kl(stats, *mix)
        return value, stats, pull_sum
    sums = torch.zeros_like(stats.student_lse)[:, None].repeat(1, 2)
    for classes in _tiles(call):
        tile = heads.over(classes)
        s, t = buffers.project(tile)
        sums += call.rows.tile_pull_sums(
            s,
            t,
            stats.student_lse,
            stats.teacher_lse,
            stats.lse_gap,
            call.spec,
            tile.student_bias,
            tile.teacher_bias,
        )
    return sums[:, 0], stats, sums[:, 1]


def recompute_gradients(
    heads: Heads,
    call: Call,
    student_lse: Tensor,
    teacher_lse: Tensor,
    lse_gap: Tensor,
    pull_sum: Tensor,
    row_weight: Tensor,
    gradients: Gradients,
) -> None:
    """Fill the gradients of sum(row_weight * divergence), walking the classes outside."""
    hidden_grad, weight_grad, bias_grad = gradients
    weights: Tensor | None = row_weight
    restore = None
    if heads.student_hidden.dtype == torch.float16:
        weights, restore = _into_fp16_range(row_weight, heads.student_hidden)
    buffers = _TileBuffers(heads, call)
    hidden_sum = _accumulator(hidden_grad, wide=True)
    for classes in _tiles(call):
        tile = heads.over(classes)
        s, t = buffers.project(tile)
        dz = s
        if not call.plan.problem.in_place:
            dz = torch.empty_like(s, dtype=tile.student_hidden.dtype)
        call.rows.tile_gradient_(
            s,
            t,
            student_lse,
            teacher_lse,
            lse_gap,
            pull_sum,
            weights,
            call.spec,
            tile.student_bias,
            tile.teacher_bias,
            dz,
        )
        if hidden_sum is not None:
            gemm.hidden_gradient(
                dz, tile.student_weight, hidden_sum, alpha=1.0, accumulate=classes.start > 0
            )
        if weight_grad is not None:
            weight_tile = weight_grad[classes]
            weight_sum = weight_tile
            if restore is not None:
                weight_sum = torch.empty_like(weight_tile, dtype=torch.float32)
            gemm.weight_gradient(dz, tile.student_hidden, weight_sum, alpha=1.0, accumulate=False)
            _finish(weight_tile, weight_sum, restore)
        if bias_grad is not None:
            bias_grad[classes] = dz.sum(0, dtype=s.dtype)
    _finish(hidden_grad, hidden_sum, restore)
    _finish(bias_grad, bias_grad, restore)
