"""Row passes of `picked` in Triton: the GPU path, with the signatures of `picked_torch`.

take        One lane per picked id: copies its transformed logit out and leaves -inf behind.
statistics  One program per (token, split of the row) folds blocks of logits into maximum, sum and
            weighted sum; a logit of -inf was taken out, or lies beyond the classes. Reads 4 bytes
            an element.
gradient    One program per (token, block): reads 4 bytes an element, writes dz in its dtype.
put         One lane per picked id: overwrites its dz, so that no 16-bit value is ever updated.

Parts of a row merge in a fixed order (`picked._merge`). Offsets of rows are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import split_columns
from esr_kernels.common.logits_triton import tanh
from esr_kernels.common.transform import LogitTransform
from esr_kernels.scoring.selected import COLUMNS, RestGradient

# (columns in a block, warps): as in rows_triton, with half its accumulators.
STATISTICS_BLOCK = (1024, 4)
GRADIENT_BLOCK = (1024, 4)
# Picked ids in a program.
_ID_BLOCK = 256


@triton.jit
def _transformed(
    z,
    bias_ptr,
    columns,
    inside,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Transformed logits of raw ones, and the softcap's derivative there."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    chain = z
    if HAS_SOFTCAP:
        x = z / softcap
        # 1 - tanh^2 without the difference: with u = 1 - tanh |x|, it is u (2 - u).
        u = 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
        chain = u * (2.0 - u)
        z = tanh(x) * softcap
    return z * inv_temperature, chain


@triton.jit
def _tile_ids(ids_ptr, first, n_cols, n_ids, n_picked, BLOCK: tl.constexpr):
    """(flat index, row, column, whether the id lies in the tile) of a block of [n, K] ids."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = flat < n_ids
    column = tl.load(ids_ptr + flat, mask=exists, other=-1) - first
    return flat, flat // n_picked, column, exists & (column >= 0) & (column < n_cols)


@triton.jit
def _take_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    ids_ptr,
    picked_ptr,
    chain_ptr,
    first,
    n_cols,
    n_ids,
    n_picked,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    flat, row, column, inside = _tile_ids(ids_ptr, first, n_cols, n_ids, n_picked, BLOCK)
    where = z_ptr + row * z_stride + column
    z = tl.load(where, mask=inside, other=0.0)
    logit, chain = _transformed(
        z, bias_ptr, column, inside, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(picked_ptr + flat, logit, mask=inside)
    if HAS_SOFTCAP:
        tl.store(chain_ptr + flat, chain, mask=inside)
    tl.store(where, tl.full([BLOCK], -float("inf"), tl.float32), mask=inside)


@triton.jit
def _put_kernel(
    dz_ptr, dz_stride, ids_ptr, picked_dz_ptr, first, n_cols, n_ids, n_picked, BLOCK: tl.constexpr
):
    flat, row, column, inside = _tile_ids(ids_ptr, first, n_cols, n_ids, n_picked, BLOCK)
    value = tl.load(picked_dz_ptr + flat, mask=inside, other=0.0)
    where = dz_ptr + row * dz_stride + column
    tl.store(where, value.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rest_statistics_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    parts_ptr,
    n_cols,
    split_cols,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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
        z, _ = _transformed(
            raw, bias_ptr, columns, inside, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        z = tl.where(raw == -float("inf"), -float("inf"), z)
        new = tl.maximum(top, tl.max(z, 0))
        # A block of -inf only must not turn into exp(-inf + inf).
        base = tl.where(new == -float("inf"), 0.0, new)
        decay = tl.exp(top - base)
        # What the sum of p * (z - top) owes for the maximum that moved.
        shift = tl.where(top == -float("inf"), 0.0, top - base)
        top = new
        p = tl.exp(z - base)
        # 0 * inf: a class of probability 0 weighs nothing whatever its logit.
        centred = (centred + shift * total) * decay + tl.where(p == 0, 0.0, p * (z - base))
        total = total * decay + p
    row_total = tl.sum(total, 0)
    norm = tl.where(row_total == 0, 1.0, row_total)
    # The order of picked's columns.
    out = parts_ptr + (row * tl.num_programs(1) + split) * N_STATS
    tl.store(out + 0, top)
    tl.store(out + 1, tl.log(row_total))
    tl.store(out + 2, tl.sum(centred, 0) / norm)


@triton.jit
def _rest_gradient_kernel(
    z_ptr,
    dz_ptr,
    z_stride,
    dz_stride,
    bias_ptr,
    top_ptr,
    lse_ptr,
    constant_ptr,
    linear_ptr,
    n_cols,
    scale,
    softcap,
    inv_temperature,
    HAS_LINEAR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n_cols
    raw = tl.load(z_ptr + row * z_stride + columns, mask=inside, other=-float("inf"))
    z, chain = _transformed(
        raw, bias_ptr, columns, inside, scale, softcap, inv_temperature, HAS_BIAS, HAS_SOFTCAP
    )
    log_pi = z - tl.load(top_ptr + row) - tl.load(lse_ptr + row)
    pi = tl.exp(log_pi)
    factor = tl.load(constant_ptr + row)
    idle = factor == 0
    dz = pi * factor
    if HAS_LINEAR:
        linear = tl.load(linear_ptr + row)
        idle = idle & (linear == 0)
        dz = tl.where(pi == 0, 0.0, pi * (factor + linear * log_pi))
    if HAS_SOFTCAP:
        dz *= chain
    # A row that asks for nothing gets nothing, even of a NaN.
    dz = tl.where(idle, 0.0, dz)
    out = dz_ptr + row * dz_stride + columns
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=inside)


def _transform_arguments(transform: LogitTransform, bias: Tensor | None) -> dict[str, object]:
    return {
        "scale": float(transform.scale),
        "softcap": float(transform.softcap or 1.0),
        "inv_temperature": 1.0 / transform.temperature,
        "bias_ptr": bias,
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": transform.softcap is not None,
    }


def tile_statistics(
    z: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ids: Tensor,
    first: int,
    picked: Tensor,
    chain: Tensor | None,
) -> Tensor:
    """Statistics [n, splits, COLUMNS] of the classes of a tile that `ids` [n, K] do not pick.

    Writes the transformed logits of those that they do to `picked` [n, K], and to `chain` [n, K],
    which there is with a softcap, its derivative 1 - tanh^2 there; leaves -inf over them in `z`.
    """
    n, classes = z.shape
    block, warps = STATISTICS_BLOCK
    splits, columns = split_columns(n, classes, block)
    parts = torch.empty(n, splits, COLUMNS, dtype=torch.float32, device=z.device)
    if n:
        arguments = _transform_arguments(transform, bias)
        _take_kernel[(triton.cdiv(ids.numel(), _ID_BLOCK),)](
            z,
            z.stride(0),
            ids_ptr=ids,
            picked_ptr=picked,
            chain_ptr=chain,
            first=first,
            n_cols=classes,
            n_ids=ids.numel(),
            n_picked=ids.shape[1],
            BLOCK=_ID_BLOCK,
            **arguments,
        )
        _rest_statistics_kernel[(n, splits)](
            z,
            z.stride(0),
            parts_ptr=parts,
            n_cols=classes,
            split_cols=columns,
            BLOCK=block,
            N_STATS=COLUMNS,
            num_warps=warps,
            **arguments,
        )
    return parts


def tile_gradient_(
    z: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ids: Tensor,
    first: int,
    picked_dz: Tensor,
    rest: RestGradient | None,
    dz: Tensor,
) -> None:
    """Write the gradient of a tile's raw logits to `dz` [n, V], which may be `z`.

    With `rest` None the classes that were not picked get 0 and `z` is not read.
    """
    n, classes = z.shape
    if n == 0:
        return
    if rest is None:
        dz.zero_()
    else:
        block, warps = GRADIENT_BLOCK
        _rest_gradient_kernel[(n, triton.cdiv(classes, block))](
            z,
            dz,
            z.stride(0),
            dz.stride(0),
            top_ptr=rest.top.contiguous(),
            lse_ptr=rest.lse.contiguous(),
            constant_ptr=rest.constant.contiguous(),
            linear_ptr=None if rest.linear is None else rest.linear.contiguous(),
            n_cols=classes,
            HAS_LINEAR=rest.linear is not None,
            BLOCK=block,
            num_warps=warps,
            **_transform_arguments(transform, bias),
        )
    _put_kernel[(triton.cdiv(ids.numel(), _ID_BLOCK),)](
        dz,
        dz.stride(0),
        ids_ptr=ids,
        picked_dz_ptr=picked_dz.contiguous(),
        first=first,
        n_cols=classes,
        n_ids=ids.numel(),
        n_picked=ids.shape[1],
        BLOCK=_ID_BLOCK,
    )
