"""Row passes of `selected` in Triton: the GPU path, with the signatures of `selected_torch`.

select      One lane per id: copies its transformed logit out and leaves a raw logit of -inf.
statistics  One program per (token, split of the row) reduces blocks of logits to maximum, sum and
            weighted sum. Reads 4 bytes an element.
gradient    One program per (token, block): reads 4 bytes an element, writes dz in its dtype.
scatter     One lane per id: overwrites its dz. Adding to it would round a 16-bit value twice.

The parts of a row are merged in a fixed order (`selected._merge`), so a launch repeats bit for bit.
Offsets of rows are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import ceil_div, launch, split_columns
from esr_kernels.common.logits_triton import (
    cap_logits,
    online_maximum,
    scale_logits,
    softcap_derivative,
    transform_logits,
    weigh,
)
from esr_kernels.common.transform import LogitTransform
from esr_kernels.scoring.tile import COLUMNS, Tile, UnselectedGradient

# (columns in a block, warps), from bench/gpu_static.py: three accumulators leave registers for 8
# columns a thread.
STATISTICS_BLOCK = (1024, 4)
GRADIENT_BLOCK = (1024, 4)
# Ids in a program.
_ID_BLOCK = 256


@triton.jit
def _tile_ids(ids_ptr, first, n_cols, n_ids, ids_of_row, BLOCK: tl.constexpr):
    """(flat index, row, column, whether the id lies in the tile) of a block of [T, K] ids."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = flat < n_ids
    column = tl.load(ids_ptr + flat, mask=exists, other=-1) - first
    return flat, flat // ids_of_row, column, exists & (column >= 0) & (column < n_cols)


@triton.jit
def _select_kernel(
    z_ptr,
    z_stride,
    ids_ptr,
    selected_ptr,
    slope_ptr,
    first,
    n_cols,
    n_ids,
    ids_of_row,
    transform,
    BLOCK: tl.constexpr,
):
    flat, row, column, inside = _tile_ids(ids_ptr, first, n_cols, n_ids, ids_of_row, BLOCK)
    where = z_ptr + row * z_stride + column
    x = scale_logits(tl.load(where, mask=inside, other=0.0), column, inside, transform)
    z, _ = cap_logits(x, transform)
    tl.store(selected_ptr + flat, z, mask=inside)
    if slope_ptr is not None:
        tl.store(slope_ptr + flat, softcap_derivative(x, transform), mask=inside)
    tl.store(where, tl.full([BLOCK], -float("inf"), tl.float32), mask=inside)


@triton.jit
def _unselected_statistics_kernel(
    z_ptr,
    z_stride,
    parts_ptr,
    n_cols,
    split_cols,
    transform,
    BLOCK: tl.constexpr,
    N_STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * split_cols
    stop = tl.minimum(start + split_cols, n_cols)
    lane = tl.arange(0, BLOCK)
    top = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    centred = tl.zeros([BLOCK], tl.float32)
    for block in range(start, stop, BLOCK):
        columns = block + lane
        inside = columns < stop
        raw = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=-float("inf"))
        z, _ = transform_logits(raw, columns, inside, transform)
        # A softcap would make the -inf of a selected class finite.
        z = tl.where(raw == -float("inf"), -float("inf"), z)
        # `online_softmax` does the same with one register more on gfx942.
        top, base, decay, shift = online_maximum(top, tl.max(z, 0))
        p = tl.exp(z - base)
        centred = (centred + shift * total) * decay + weigh(p, z - base)
        total = total * decay + p
    row_total = tl.sum(total, 0)
    norm = tl.where(row_total == 0, 1.0, row_total)
    # MAX, LOG_SUM, CENTRED
    out = parts_ptr + (row * tl.num_programs(1) + split) * N_STATS
    tl.store(out + 0, top)
    tl.store(out + 1, tl.log(row_total))
    tl.store(out + 2, tl.sum(centred, 0) / norm)


@triton.jit
def _unselected_gradient_kernel(
    z_ptr,
    dz_ptr,
    z_stride,
    dz_stride,
    top_ptr,
    lse_ptr,
    constant_ptr,
    linear_ptr,
    n_cols,
    transform,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_cols
    raw = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=-float("inf"))
    x = scale_logits(raw, columns, inside, transform)
    softcap_slope = softcap_derivative(x, transform)
    z, _ = cap_logits(x, transform)
    log_pi = z - tl.load(top_ptr + row) - tl.load(lse_ptr + row)
    pi = tl.exp(log_pi)
    constant = tl.load(constant_ptr + row)
    idle = constant == 0
    dz = pi * constant
    if linear_ptr is not None:
        linear = tl.load(linear_ptr + row)
        idle = idle & (linear == 0)
        dz = weigh(pi, constant + linear * log_pi)
    dz *= softcap_slope
    # A row without a gradient gets 0, even if its logits are NaN.
    dz = tl.where(idle, 0.0, dz)
    out = dz_ptr + row * dz_stride + columns
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scatter_kernel(
    dz_ptr,
    dz_stride,
    ids_ptr,
    selected_dz_ptr,
    first,
    n_cols,
    n_ids,
    ids_of_row,
    BLOCK: tl.constexpr,
):
    flat, row, column, inside = _tile_ids(ids_ptr, first, n_cols, n_ids, ids_of_row, BLOCK)
    value = tl.load(selected_dz_ptr + flat, mask=inside, other=0.0)
    where = dz_ptr + row * dz_stride + column
    tl.store(where, value.to(dz_ptr.dtype.element_ty), mask=inside)


def tile_statistics(
    tile: Tile,
    transform: LogitTransform,
    ids: Tensor,
    selected: Tensor,
    softcap_slope: Tensor | None,
) -> Tensor:
    """Statistics [T, splits, COLUMNS] of the classes of a tile that are not in `ids` [T, K].

    Writes the transformed logits of those that are to `selected` [T, K] and, with a softcap, its
    derivative 1 - tanh^2 there to `softcap_slope` [T, K]; leaves -inf over them in the tile.
    """
    z, bias, first = tile
    tokens, classes = z.shape
    block, warps = STATISTICS_BLOCK
    splits, columns = split_columns(tokens, classes, block)
    parts = torch.empty(tokens, splits, COLUMNS, dtype=torch.float32, device=z.device)
    if tokens == 0:
        return parts
    launch(_select_kernel, (ceil_div(ids.numel(), _ID_BLOCK),), z)(
        z,
        z.stride(0),
        ids_ptr=ids,
        selected_ptr=selected,
        slope_ptr=softcap_slope,
        first=first,
        n_cols=classes,
        n_ids=ids.numel(),
        ids_of_row=ids.shape[1],
        transform=transform.kernel_argument(bias),
        BLOCK=_ID_BLOCK,
    )
    launch(_unselected_statistics_kernel, (tokens, splits), z)(
        z,
        z.stride(0),
        parts_ptr=parts,
        n_cols=classes,
        split_cols=columns,
        transform=transform.kernel_argument(bias),
        BLOCK=block,
        N_STATS=COLUMNS,
        num_warps=warps,
    )
    return parts


def tile_gradient_(
    tile: Tile,
    transform: LogitTransform,
    ids: Tensor,
    selected_dz: Tensor,
    unselected: UnselectedGradient | None,
    dz: Tensor,
) -> None:
    """Write the gradient of a tile's raw logits to `dz` [T, w], which may be `tile.z`.

    With `unselected` None the unselected classes get 0, and the logits are not read.
    """
    z, bias, first = tile
    tokens, classes = z.shape
    if tokens == 0:
        return
    if unselected is None:
        dz.zero_()
    else:
        block, warps = GRADIENT_BLOCK
        linear = unselected.linear
        launch(_unselected_gradient_kernel, (tokens, ceil_div(classes, block)), z)(
            z,
            dz,
            z.stride(0),
            dz.stride(0),
            top_ptr=unselected.top.contiguous(),
            lse_ptr=unselected.lse.contiguous(),
            constant_ptr=unselected.constant.contiguous(),
            linear_ptr=None if linear is None else linear.contiguous(),
            n_cols=classes,
            transform=transform.kernel_argument(bias),
            BLOCK=block,
            num_warps=warps,
        )
    launch(_scatter_kernel, (ceil_div(ids.numel(), _ID_BLOCK),), dz)(
        dz,
        dz.stride(0),
        ids_ptr=ids,
        selected_dz_ptr=selected_dz.contiguous(),
        first=first,
        n_cols=classes,
        n_ids=ids.numel(),
        ids_of_row=ids.shape[1],
        BLOCK=_ID_BLOCK,
    )
