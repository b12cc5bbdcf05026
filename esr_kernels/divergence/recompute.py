"""Plans "recompute" and "fused": a few floats a token are stored between forward and backward.

The forward projects one tile of classes after another and stores only each row's statistics (a
"fused" forward computes them in one Triton kernel, with no logits in memory). The backward projects
the tiles again and writes each tile of the head's gradient once, in its final dtype, while the
gradient of the hidden states accumulates in fp32. It takes any upstream gradient, any number of
times, and classes that are sharded over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.rows import spread_rows, take_rows
from esr_kernels.common.tiles import TileBuffer, class_tiles
from esr_kernels.common.workspace import borrow_rows
from esr_kernels.divergence.call import (
    Call,
    Gradients,
    Operands,
    Outputs,
    Wanted,
    accumulator,
    finish,
    new_gradients,
    scaled_to_fp16,
)
from esr_kernels.divergence.merged import MergedClass, merged_class
from esr_kernels.divergence.outputs import cross_entropy, outputs, spread_outputs
from esr_kernels.divergence.statistics import (
    ARGMAX,
    RowNormalizers,
    RowStats,
    Tile,
    from_pull_sums,
    merge_to_part,
    row_normalizers,
    with_labels,
)


def recompute_forward(
    call: Call, active: Tensor | None, row_weight: Tensor | None, operands: Operands
) -> tuple[Outputs, RowNormalizers]:
    """Outputs, and the normalizers of every row for `recompute_backward`.

    `active` [n] int64 are the rows to compute, None for all; the others have weight 0.
    """
    tokens = operands.student_hidden.shape[0]
    whole = operands.take(active, row_weight)
    x = whole.shared(call.classes)
    weights, factor = call.row_weights(row_weight, active, x.student_hidden.shape[0])
    with matmul.plain_precision(x.student_hidden):
        merged = None if call.merge is None else merged_class(whole, x, call)
        rest = x if merged is None else merged.rest
        values, stats, normalizers = _statistics(rest, merged, call)
        entropy_of = cross_entropy if merged is None else merged.cross_entropy
        label_entropy = None if x.labels is None else entropy_of(x, stats, call)
        of_active = outputs(values, stats, label_entropy, weights, factor, call)
    kept = RowNormalizers(*(spread_rows(field, active, tokens) for field in normalizers))
    return spread_outputs(of_active, active, tokens), kept


def _statistics(
    x: Operands, merged: MergedClass | None, call: Call
) -> tuple[Tensor, RowStats, RowNormalizers]:
    """(divergence, statistics, normalizers) of every row, from logits that are discarded."""
    parts = _fused_parts(x, call) if call.plan.kind == "fused" else _tile_parts(x, call)
    if call.group is not None:
        parts = _gather(merge_to_part(parts), call.group)
    merge_rows = call.rows.merge_rows if merged is None else merged.merge_rows
    stats, value, pull_sum = merge_rows(parts, x.labels, call.spec)
    if value is None or pull_sum is None:
        sums = torch.zeros_like(stats.student_lse)[:, None].repeat(1, 3)
        for _, _, tile in _projected_tiles(x, call):
            sums += call.rows.tile_pull_sums(tile, stats, call.spec)
        if merged is not None:
            sums += merged.pull_sums(stats)
        if call.group is not None:
            dist.all_reduce(sums, group=call.group)
        value, pull_sum = from_pull_sums(sums)
        pull_sum = with_labels(pull_sum, x.labels, call.spec)
    return value, stats, row_normalizers(stats, pull_sum)


def _projected_tiles(x: Operands, call: Call) -> Iterator[tuple[slice, Operands, Tile]]:
    """(classes, operands over them, logits) of one tile after another, in reused buffers."""
    tokens, widest = x.student_hidden.shape[0], call.plan.vocab_chunk
    device, dtype = x.student_hidden.device, matmul.logits_dtype(x.student_hidden.dtype)
    s_buffer = TileBuffer("dz", tokens, widest, device, dtype)
    t_buffer = TileBuffer("teacher", tokens, widest, device, dtype)
    for classes in class_tiles(call.classes, widest):
        own = x.over(classes)
        s, t = (buffer.rows(classes.stop - classes.start) for buffer in (s_buffer, t_buffer))
        matmul.project(own.student_hidden, own.student_weight, s, own.student_ids)
        matmul.project(own.teacher_hidden, own.teacher_weight, t, own.teacher_ids)
        yield classes, own, Tile(s, t, own.student_bias, own.teacher_bias, own.labels)


def _tile_parts(x: Operands, call: Call) -> Tensor:
    """Statistics [T, parts, COLUMNS] of all classes, a tile of logits at a time."""
    parts = []
    for classes, _, tile in _projected_tiles(x, call):
        part = call.rows.tile_stats(tile, call.spec)
        part[:, :, ARGMAX] += classes.start
        parts.append(part)
    return torch.cat(parts, dim=1)


def _fused_parts(x: Operands, call: Call) -> Tensor:
    """The statistics of `_tile_parts`, without logits in memory."""
    from esr_kernels.divergence.fused_triton import fused_stats  # Triton may not be installed.

    return fused_stats(x, call.spec)


def _gather(part: Tensor, group: Any) -> Tensor:
    """[T, COLUMNS] of this rank -> [T, ranks, COLUMNS], the same on every rank."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts, dim=1)


def recompute_backward(
    call: Call,
    active: Tensor | None,
    row_weight: Tensor | None,
    operands: Operands,
    normalizers: RowNormalizers,
    upstream: Tensor,
    wanted: Wanted,
    weight_grad: Tensor | None = None,
) -> Gradients:
    """Gradients of sum(upstream * loss). The head's is added to `weight_grad` if that is given.

    `upstream` is a scalar, or [T] with reduction "none".
    """
    tokens = operands.student_hidden.shape[0]
    whole = operands.take(active, row_weight)
    adds = weight_grad is not None
    gradients = new_gradients(wanted._replace(weight=wanted.weight and not adds), whole, call)
    x = whole.shared(call.classes)
    weights, factor = call.row_weights(row_weight, active, x.student_hidden.shape[0])
    rows = RowNormalizers(*(take_rows(field, active) for field in normalizers))
    scale = upstream if upstream.dim() == 0 else take_rows(upstream, active)
    scale = (scale * (factor * call.spec.student.slope)).to(rows.student_lse.dtype)
    scale = scale.expand_as(rows.student_lse)
    if weights is not None:
        scale = scale * weights
    buffers = gradients._replace(weight=weight_grad) if adds else gradients
    with matmul.plain_precision(x.student_hidden):
        merged = None if call.merge is None else merged_class(whole, x, call)
        rest = x if merged is None else merged.rest
        _accumulate_gradients(
            rest, merged, call, rows, scale.contiguous(), buffers, add_weight=adds
        )
    if gradients.hidden is not None:
        gradients = gradients._replace(hidden=spread_rows(gradients.hidden, active, tokens))
    return gradients.in_dtype_of(operands)


def _accumulate_gradients(
    x: Operands,
    merged: MergedClass | None,
    call: Call,
    normalizers: RowNormalizers,
    row_weight: Tensor,
    gradients: Gradients,
    *,
    add_weight: bool,
) -> None:
    """Fill the gradients of sum(row_weight * row).

    `add_weight`: the head's gradient is added to what its buffer holds.
    """
    weights, restore = row_weight, None
    if x.student_hidden.dtype == torch.float16:
        weights, restore = scaled_to_fp16(row_weight, x.student_hidden)
    hidden_sum = accumulator(gradients.hidden, wide=True)
    weight = gradients.over_shared_classes(x, call.classes).weight
    for classes, own, tile in _projected_tiles(x, call):
        dz = tile.s
        if not call.plan.problem.in_place:
            shape, hidden = (tile.s.shape[0], tile.s.shape[1]), own.student_hidden
            dz = borrow_rows("rounded", shape, hidden.device, hidden.dtype)
        call.rows.tile_gradient_(tile, normalizers, weights, call.spec, dz)
        if hidden_sum is not None:
            add = classes.start > 0
            matmul.hidden_gradient(
                dz, own.student_weight, hidden_sum, own.student_ids, alpha=1.0, accumulate=add
            )
        if weight is not None:
            target = weight[classes] if own.student_ids is None else weight
            _write_weight_tile(dz, own, target, restore, add_weight)
        if gradients.bias is not None:
            gradients.add_to_bias(own, classes, dz.sum(0, dtype=tile.s.dtype))
    if merged is not None:
        merged.set_dz(normalizers, weights)
        if hidden_sum is not None:
            merged.add_hidden_gradient(hidden_sum, 1.0)
        if gradients.bias is not None:
            merged.add_bias_gradient(gradients.bias, 1.0)
        if gradients.weight is not None:
            merged.set_weight_gradient(
                x.student_hidden, gradients.weight, 1.0, restore, add=add_weight
            )
    if hidden_sum is not None and call.group is not None:
        dist.all_reduce(hidden_sum, group=call.group)
    finish(gradients.hidden, hidden_sum, restore)
    finish(gradients.bias, gradients.bias, restore)


def _write_weight_tile(
    dz: Tensor, own: Operands, target: Tensor, restore: Tensor | None, add: bool
) -> None:
    """Write (or add) the head's gradient of a tile of classes, once, in its final dtype."""
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
