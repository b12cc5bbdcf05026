"""Statistics of tiles of logits in Triton, and functions that all kernels of the sampler share.

One program per (row, 8 tiles) reads the logits once and writes the maximum and the log-sum of each
tile of 256 classes: 8 bytes a tile.

Logits beyond the classes load as -inf. Offsets of rows are 64-bit: B * V passes 2**31 at 14,135
rows of a Qwen vocabulary. Reductions have a fixed order, so repeated launches agree bit for bit.

Kernels take a `transform` tuple, (bias_ptr, scale, softcap, inv_temperature_ptr, invalid_ptr), that
`kernel_transform` makes. Pointers and the softcap are None where they are not used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import ceil_div, launch
from esr_kernels.common.logits_triton import transform_logits
from esr_kernels.sampling.params import TILE, Classes, RowParams

# (tiles in a program, warps): 16 logits a thread.
STATISTICS_BLOCK = (8, 4)


@triton.jit
def inverse_temperature(transform, row):
    """The inverse temperature of `row`; 1 where the launch has none."""
    _, _, _, inv_temperature_ptr, _ = transform
    value = 1.0
    if inv_temperature_ptr is not None:
        value = tl.load(inv_temperature_ptr + row)
    return value


@triton.jit
def transform_valid(z, classes, inside, transform, inv_temperature):
    """Transformed logits of raw ones, -inf where there is no valid class.

    `transform` is that of the launch; `inv_temperature` that of the row. Triton before 3.7 cannot
    return the two as one tuple, which may hold None.
    """
    bias_ptr, scale, softcap, _, invalid_ptr = transform
    z, _ = transform_logits(z, classes, inside, (bias_ptr, scale, softcap, inv_temperature))
    if invalid_ptr is not None:
        inside = inside & (tl.load(invalid_ptr + classes, mask=inside, other=1) == 0)
    return tl.where(inside, z, -float("inf"))


@triton.jit
def nan_to_neg_inf(z):
    """NaN replaced by -inf, so that a maximum is a number."""
    return tl.where(z == z, z, -float("inf"))


@triton.jit
def keep(z, classes, row, cutoff):
    """Logits with -inf in place of those that the filters remove.

    `cutoff` is (threshold_ptr, last_ptr): a row keeps the classes above its threshold, and at the
    threshold those up to its last class.
    """
    threshold_ptr, last_ptr = cutoff
    threshold, last = tl.load(threshold_ptr + row), tl.load(last_ptr + row)
    return tl.where((z > threshold) | ((z == threshold) & (classes <= last)), z, -float("inf"))


@triton.jit
def tile_logsumexp(z, AXIS: tl.constexpr):
    """(maxima, log of the sums of exp(z - maximum)) of tiles whose classes lie along `AXIS`."""
    top = tl.max(nan_to_neg_inf(z), AXIS)
    # A tile of -inf only must not turn into exp(-inf + inf). NaN and +inf make the sum NaN.
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(z - tl.expand_dims(base, AXIS)), AXIS)
    return top, tl.log(total)


@triton.jit
def _tile_statistics_kernel(
    logits_ptr,
    logits_stride,
    transform,
    cutoff,
    statistics,
    n_classes,
    n_tiles,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.program_id(1) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    classes = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = classes < n_classes
    raw = tl.load(logits_ptr + row * logits_stride + classes, mask=inside, other=0.0)
    inv_temperature = inverse_temperature(transform, row)
    z = transform_valid(raw.to(tl.float32), classes, inside, transform, inv_temperature)
    if cutoff is not None:
        z = keep(z, classes, row, cutoff)
    maxima, log_sums = tile_logsumexp(z, 1)
    maxima_ptr, log_sums_ptr = statistics
    out = row * n_tiles + tiles
    tl.store(maxima_ptr + out, maxima, mask=tiles < n_tiles)
    tl.store(log_sums_ptr + out, log_sums, mask=tiles < n_tiles)


def tile_statistics(
    raw: Tensor, classes: Classes, params: RowParams, cutoff: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Maxima and log-sums [B, tiles] fp32 of raw logits, over the classes that `cutoff` keeps."""
    rows, tiles = raw.shape[0], ceil_div(classes.count, TILE)
    statistics = empties(2, rows, tiles, like=raw)
    block, warps = STATISTICS_BLOCK
    if rows:
        launch(_tile_statistics_kernel, (rows, ceil_div(tiles, block)), raw)(
            raw,
            raw.stride(0),
            transform=kernel_transform(classes, params),
            cutoff=cutoff,
            statistics=statistics,
            n_classes=classes.count,
            n_tiles=tiles,
            TILE=TILE,
            BLOCK_TILES=block,
            num_warps=warps,
        )
    maxima, log_sums = statistics
    return maxima, log_sums


def kernel_transform(
    classes: Classes, params: RowParams
) -> tuple[Tensor | None, float | None, float | None, Tensor | None, Tensor | None]:
    """The `transform` tuple of a launch."""
    bias = None if classes.bias is None else classes.bias.contiguous()
    invalid = None if classes.invalid is None else classes.invalid.contiguous().view(torch.uint8)
    # The temperature of the classes is 1: that of each row is applied instead.
    bias, scale, softcap, _ = classes.transform.kernel_argument(bias)
    return bias, scale, softcap, params.inv_temperature, invalid


def empties(
    count: int, *shape: int, like: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Uninitialised tensors, each aligned: Triton compiles another kernel for unaligned ones."""
    return tuple(torch.empty(shape, dtype=dtype, device=like.device) for _ in range(count))
