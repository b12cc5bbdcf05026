"""Running a plan: the loops over chunks of tokens (stash) and tiles of classes (recompute).

Autograd lives in `autograd`, input checks in `checks`, reductions in `passes`; the arithmetic on
logits in the row passes. Here is only which GEMM feeds which pass, and into which buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.workspace import borrow, borrow_rows, row_stride
from esr_kernels.divergence.plan import Plan
from esr_kernels.divergence.statistics import (
    ARGMAX,
    RowsKnown,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    known_rows,
    merge_parts,
    merge_to_part,
    mixed_kl,
)


@dataclass(frozen=True)
class Call:
    """The non-tensor side of one call."""

    spec: RowSpec
    plan: Plan
    rows: ModuleType  # rows_triton, rows_native or rows_torch
    classes: int  # that both models have, on this rank
    reduction: str
    group: Any = None  # torch.distributed group over whose ranks the classes are sharded


class Operands(NamedTuple):
    """Both models over the active rows. Biases are over the shared classes already."""

    student_hidden: Tensor  # [T, Ds]
    student_weight: Tensor  # [Vs, Ds]
    student_bias: Tensor | None  # [V]
    student_ids: Tensor | None  # [V] rows of the head, None for the first V
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    teacher_ids: Tensor | None
    labels: Tensor | None  # [T] class numbers, negative for none

    def over(self, classes: slice) -> Operands:
        """The operands of a tile of classes; heads of mapped vocabularies are copied tile-wise."""
        student_weight, student_ids = _select(self.student_weight, self.student_ids, classes)
        teacher_weight, teacher_ids = _select(self.teacher_weight, self.teacher_ids, classes)
        return Operands(
            self.student_hidden,
            student_weight,
            None if self.student_bias is None else self.student_bias[classes],
            student_ids,
            self.teacher_hidden,
            teacher_weight,
            None if self.teacher_bias is None else self.teacher_bias[classes],
            teacher_ids,
            None if self.labels is None else self.labels - classes.start,
        )

    def take(self, rows: Tensor | None, row_weight: Tensor | None) -> Operands:
        """The operands of these rows; of all for None, zeros where the weight is 0.

        A row of weight 0 has a dz of 0, and 0 * NaN must not reach the gradient of the head.
        """
        if rows is None:
            if row_weight is None:
                return self
            live = row_weight.ne(0)[:, None]
            return self._replace(
                student_hidden=torch.where(live, self.student_hidden, 0),
                teacher_hidden=torch.where(live, self.teacher_hidden, 0),
            )
        return self._replace(
            student_hidden=self.student_hidden[rows],
            teacher_hidden=self.teacher_hidden[rows],
            labels=None if self.labels is None else self.labels[rows],
        )


def _select(weight: Tensor, ids: Tensor | None, classes: slice) -> tuple[Tensor, Tensor | None]:
    return (weight[classes], None) if ids is None else (weight, ids[classes])


class Gradients(NamedTuple):
    """Buffers for the gradients of hidden [T, D], weight [Vs, D], bias [V]; None if not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


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
    return torch.zeros_like(gradient, dtype=torch.float32)


def _finish(gradient: Tensor | None, accumulator: Tensor | None, restore: Tensor | None) -> None:
    if gradient is None or accumulator is None:
        return
    if restore is not None:
        accumulator.mul_(restore)
    if accumulator is not gradient:
        gradient.copy_(accumulator)


def stash(
    x: Operands, row_weight: Tensor | None, factor: float, call: Call, gradients: Gradients
) -> tuple[Tensor, RowStats]:
    """Divergence and statistics of every row.

    Fills the gradients of factor * sum(row_weight * (divergence + label_weight * cross-entropy)).
    """
    plan, dtype = call.plan, matmul.logits_dtype(x.student_hidden.dtype)
    tokens, in_place = x.student_hidden.shape[0], plan.problem.in_place
    restore = None
    if x.student_hidden.dtype == torch.float16:
        row_weight, restore = _into_fp16_range(row_weight, x.student_hidden)

    def buffer(name: str, rows: int, of: torch.dtype) -> Tensor:
        return borrow_rows(name, (min(rows, tokens), call.classes), x.student_hidden.device, of)

    dz_buffer = buffer("dz", plan.token_chunk, dtype if in_place else x.student_hidden.dtype)
    if plan.teacher_in_gradient and gradients.weight is not None:
        height, row = min(plan.logit_chunk, tokens), row_stride(call.classes)
        per_logit = dtype.itemsize // gradients.weight.dtype.itemsize
        idle = gradients.weight.flatten()[: height * row * per_logit]
        teacher_buffer = idle.view(dtype).view(height, row)[:, : call.classes]
    else:
        teacher_buffer = buffer("teacher", plan.logit_chunk, dtype)
    student_buffer = None if in_place else buffer("student", plan.logit_chunk, dtype)
    hidden_sum = _accumulator(gradients.hidden, restore is not None)
    weight_sum = _accumulator(gradients.weight, plan.sums_weight_apart)
    values, stats = [], []
    for start in range(0, tokens, plan.token_chunk):
        chunk = slice(start, min(start + plan.token_chunk, tokens))
        hidden = x.student_hidden[chunk]
        dz = dz_buffer[: hidden.shape[0]]
        if in_place:
            matmul.project(hidden, x.student_weight, dz, x.student_ids)
        for first in range(chunk.start, chunk.stop, plan.logit_chunk):
            rows = slice(first, min(first + plan.logit_chunk, chunk.stop))
            inside = slice(rows.start - start, rows.stop - start)
            t = teacher_buffer[: rows.stop - rows.start]
            matmul.project(x.teacher_hidden[rows], x.teacher_weight, t, x.teacher_ids)
            s = dz[inside]
            if student_buffer is not None:
                s = student_buffer[: rows.stop - rows.start]
                matmul.project(x.student_hidden[rows], x.student_weight, s, x.student_ids)
            labels = None if x.labels is None else x.labels[rows]
            value, stat = call.rows.stash_rows_(
                Tile(s, t, x.student_bias, x.teacher_bias, labels),
                None if row_weight is None else row_weight[rows],
                call.spec,
                s if in_place else dz[inside],
            )
            values.append(value)
            stats.append(stat)
        if hidden_sum is not None:
            matmul.hidden_gradient(
                dz,
                x.student_weight,
                hidden_sum[chunk],
                x.student_ids,
                alpha=factor,
                accumulate=False,
            )
        if weight_sum is not None:
            matmul.weight_gradient(
                dz, hidden, weight_sum, x.student_ids, alpha=factor, accumulate=start > 0
            )
        if gradients.bias is not None:
            gradients.bias.add_(dz.sum(0, dtype=dtype), alpha=factor)
    if not values and weight_sum is not None:
        weight_sum.zero_()
    _finish(gradients.hidden, hidden_sum, restore)
    _finish(gradients.weight, weight_sum, restore)
    _finish(gradients.bias, gradients.bias, restore)
    return _concatenate(values, stats, x.student_hidden, dtype)


def _concatenate(
    values: list[Tensor], stats: list[RowStats], like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, RowStats]:
    fields = RowStats.__dataclass_fields__
    if not values:
        empty = torch.empty(0, dtype=dtype, device=like.device)
        return empty, RowStats(*[empty] * len(fields))
    return torch.cat(values), RowStats(
        *(torch.cat([getattr(part, name) for part in stats]) for name in fields)
    )


class _Tiles:
    """Tiles of classes, for all tokens: their operands, and their logits in reused buffers."""

    def __init__(self, x: Operands, call: Call) -> None:
        dtype = matmul.logits_dtype(x.student_hidden.dtype)
        size = (x.student_hidden.shape[0] * row_stride(call.plan.vocab_chunk),)
        self._s = borrow("dz", size, x.student_hidden.device, dtype)
        self._t = borrow("teacher", size, x.student_hidden.device, dtype)
        self._x, step = x, call.plan.vocab_chunk
        self.classes = [
            slice(at, min(at + step, call.classes)) for at in range(0, call.classes, step)
        ]

    def project(self, classes: slice) -> tuple[Operands, Tile]:
        x = self._x.over(classes)
        tokens, width = x.student_hidden.shape[0], classes.stop - classes.start
        padded = tokens, row_stride(width)
        s, t = (
            flat[: padded[0] * padded[1]].view(padded)[:, :width] for flat in (self._s, self._t)
        )
        matmul.project(x.student_hidden, x.student_weight, s, x.student_ids)
        matmul.project(x.teacher_hidden, x.teacher_weight, t, x.teacher_ids)
        return x, Tile(s, t, x.student_bias, x.teacher_bias, x.labels)


def forward_only(x: Operands, call: Call) -> tuple[Tensor, RowStats, RowsKnown]:
    """(divergence, statistics, what a backward needs) of every row, from discarded logits."""
    parts = _fused_parts(x, call) if call.plan.kind == "fused" else _tile_parts(x, call)
    if call.group is not None:
        parts = _gather(merge_to_part(parts), call.group)
    stats = merge_parts(parts)
    mix = call.spec.divergence.kl_weights
    if mix is not None:
        value, pull_sum = mixed_kl(stats, *mix)
    else:
        sums = torch.zeros_like(stats.student_lse)[:, None].repeat(1, 3)
        tiles = _Tiles(x, call)
        for classes in tiles.classes:
            sums += call.rows.tile_pull_sums(tiles.project(classes)[1], stats, call.spec)
        if call.group is not None:
            dist.all_reduce(sums, group=call.group)
        value, pull_sum = from_pull_sums(sums)
    return value, stats, known_rows(stats, pull_sum, x.labels, call.spec)


def _tile_parts(x: Operands, call: Call) -> Tensor:
    """Statistics [T, parts, COLUMNS] of all classes, a tile of logits at a time."""
    tiles, parts = _Tiles(x, call), []
    for classes in tiles.classes:
        part = call.rows.tile_stats(tiles.project(classes)[1], call.spec)
        part[:, :, ARGMAX] += classes.start
        parts.append(part)
    return torch.cat(parts, dim=1)


def _fused_parts(x: Operands, call: Call) -> Tensor:
    """The same without logits in memory."""
    from esr_kernels.divergence.fused_triton import fused_stats

    return fused_stats(
        x.student_hidden,
        x.student_weight,
        x.teacher_hidden,
        x.teacher_weight,
        call.spec,
        x.student_bias,
        x.teacher_bias,
    )


def _gather(part: Tensor, group: Any) -> Tensor:
    """[T, COLUMNS] of this rank -> [T, ranks, COLUMNS], the same on every rank."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts, dim=1)


def recompute_gradients(
    x: Operands,
    call: Call,
    known: RowsKnown,
    row_weight: Tensor,
    gradients: Gradients,
    *,
    add_weight: bool,
) -> None:
    """Fill the gradients of sum(row_weight * row), walking the classes outside.

    `add_weight`: the weight gradient is added to what its buffer holds.
    """
    weights: Tensor | None = row_weight
    restore = None
    if x.student_hidden.dtype == torch.float16:
        weights, restore = _into_fp16_range(row_weight, x.student_hidden)
    tiles = _Tiles(x, call)
    hidden_sum = _accumulator(gradients.hidden, wide=True)
    for classes in tiles.classes:
        own, tile = tiles.project(classes)
        dz = tile.s
        if not call.plan.problem.in_place:
            h = own.student_hidden
            dz = borrow_rows("rounded", (tile.s.shape[0], tile.s.shape[1]), h.device, h.dtype)
        call.rows.tile_gradient_(tile, known, weights, call.spec, dz)
        if hidden_sum is not None:
            matmul.hidden_gradient(
                dz,
                own.student_weight,
                hidden_sum,
                own.student_ids,
                alpha=1.0,
                accumulate=classes.start > 0,
            )
        if gradients.weight is not None:
            target = gradients.weight
            if own.student_ids is None:
                target = target[classes]
            _weight_tile(dz, own, target, restore, add_weight)
        if gradients.bias is not None:
            gradients.bias[classes] = dz.sum(0, dtype=tile.s.dtype)
    if hidden_sum is not None and call.group is not None:
        dist.all_reduce(hidden_sum, group=call.group)
    _finish(gradients.hidden, hidden_sum, restore)
    _finish(gradients.bias, gradients.bias, restore)


def _weight_tile(
    dz: Tensor, own: Operands, target: Tensor, restore: Tensor | None, add: bool
) -> None:
    """Write (or add) the weight gradient of a tile of classes, once, in its final dtype."""
    hidden, ids = own.student_hidden, own.student_ids
    if restore is None:
        matmul.weight_gradient(dz, hidden, target, ids, alpha=1.0, accumulate=add)
        return
    tile = torch.empty(dz.shape[1], hidden.shape[1], dtype=torch.float32, device=dz.device)
    matmul.weight_gradient(dz, hidden, tile, alpha=1.0, accumulate=False)
    tile = tile.mul_(restore).to(target.dtype)
    if ids is not None:
        (target.index_add_ if add else target.index_copy_)(0, ids, tile)
    elif add:
        target.add_(tile)
    else:
        target.copy_(tile)
