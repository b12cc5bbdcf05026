"""Draws from rows of logits in Triton, by the method of `draw_torch`: the GPU path of the sampler.

statistics  `tiles_triton`: maximum and log-sum of each tile of 256 classes.
cutoff      With filters, `filters_triton`: a threshold for each row. Then the statistics once more,
            over the kept classes.
draw        One program per row: a Gumbel variate for each tile (594 of a Qwen vocabulary, not
            151,936), the best tile, and in it a class by inverting its cumulative sum. Reads the
            tiles' statistics and 256 logits.

Nothing of the size of the logits is written, and no launch depends on values on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import launch
from esr_kernels.sampling.filters_triton import cutoffs
from esr_kernels.sampling.params import TILE, Classes, RowParams, Sample
from esr_kernels.sampling.philox import SampleKeys, key_words, step_tensor
from esr_kernels.sampling.philox_triton import gumbel, tile_words, uniform
from esr_kernels.sampling.tiles_triton import (
    empties,
    inverse_temperature,
    keep,
    kernel_transform,
    nan_to_neg_inf,
    tile_statistics,
    transform_valid,
)

# Tiles of a row at a time; columns of the head where a tile's logits are recomputed; warps.
DRAW_BLOCK = (512, 32, 8)


@triton.jit
def _dot_tile(hidden_ptr, head, classes, inside, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Logits of one row and a tile of classes from the row's hidden state.

    `head` is (weight_ptr, weight_stride, depth).
    """
    weight_ptr, weight_stride, depth = head
    lane = tl.arange(0, BLOCK_D)
    weight = weight_ptr + classes.to(tl.int64)[:, None] * weight_stride + lane[None, :]
    total = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, depth, BLOCK_D):
        exists = lane < depth - start
        h = tl.load(hidden_ptr + start + lane, mask=exists, other=0.0).to(tl.float32)
        w = tl.load(weight + start, mask=inside[:, None] & exists[None, :], other=0.0)
        total += h[None, :] * w.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def _with_seed(keys, seed_low, seed_high, seed_ptr):
    """The `keys` of `tile_words`; a seed in memory is read where it is used, to save registers."""
    rows_ptr, step_ptr, step_stride = keys
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        seed_low = seed.to(tl.int32)
        seed_high = (seed >> 32).to(tl.int32)
    return rows_ptr, step_ptr, step_stride, seed_low, seed_high


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _draw_kernel(
    source_ptr,
    source_stride,
    head,
    transform,
    greedy_ptr,
    statistics,
    cutoff,
    kept_statistics,
    keys,
    seed_low,
    seed_high,
    seed_ptr,
    sample,
    n_classes,
    n_tiles,
    ALL_GREEDY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Choose a tile of a row by its statistics, then a class in it by its logits.

    The source is logits, or with a `head` hidden states. `cutoff` and `kept_statistics` are None
    without filters. Where there is a `seed_ptr`, the seed is read from it.
    """
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_TILES)
    first_of_row = row * n_tiles
    maxima_ptr, log_sums_ptr = statistics

    top = -float("inf")
    for start in range(0, n_tiles, BLOCK_TILES):
        exists = start + lane < n_tiles
        at = first_of_row + start + lane
        top = tl.maximum(top, tl.max(tl.load(maxima_ptr + at, mask=exists, other=-float("inf")), 0))
    base = tl.where(top == -float("inf"), 0.0, top)

    total = tl.zeros([BLOCK_TILES], tl.float32)
    kept = tl.zeros([BLOCK_TILES], tl.float32)
    largest_tile = n_tiles
    drawn_tile = n_tiles
    best = -float("inf")
    for start in range(0, n_tiles, BLOCK_TILES):
        tiles = start + lane
        exists = tiles < n_tiles
        at = first_of_row + tiles
        maxima = tl.load(maxima_ptr + at, mask=exists, other=-float("inf"))
        log_sums = tl.load(log_sums_ptr + at, mask=exists, other=-float("inf"))
        largest = tl.min(tl.where((maxima == top) & exists, tiles, n_tiles), 0)
        largest_tile = tl.minimum(largest_tile, largest)
        total += tl.exp(maxima - base + log_sums)
        if not ALL_GREEDY:
            if kept_statistics is not None:
                kept_maxima_ptr, kept_log_sums_ptr = kept_statistics
                maxima = tl.load(kept_maxima_ptr + at, mask=exists, other=-float("inf"))
                log_sums = tl.load(kept_log_sums_ptr + at, mask=exists, other=-float("inf"))
                kept += tl.exp(maxima - base + log_sums)
            keys_and_seed = _with_seed(keys, seed_low, seed_high, seed_ptr)
            high, low, _, _ = tile_words(tiles, row, keys_and_seed)
            score = nan_to_neg_inf(maxima - base + log_sums + gumbel(high, low))
            score = tl.where(exists, score, -float("inf"))
            block_best = tl.max(score, 0)
            block_tile = tl.min(tl.where(score == block_best, tiles, n_tiles), 0)
            drawn_tile = tl.where(block_best > best, block_tile, drawn_tile)
            best = tl.maximum(best, block_best)
    lse_above = tl.log(tl.sum(total, 0))
    lse = base + lse_above
    # A row of NaN, with +inf or of only -inf has no distribution.
    proper = (lse == lse) & (lse > -float("inf")) & (lse < float("inf"))
    by_size = lse != lse
    if ALL_GREEDY:
        by_size = top == top
    else:
        by_size = (proper == 0) | (drawn_tile >= n_tiles)
        if greedy_ptr is not None:
            by_size = by_size | (tl.load(greedy_ptr + row) != 0)
    tile = tl.where(by_size, largest_tile, drawn_tile)

    lane = tl.arange(0, TILE)
    classes = tile * TILE + lane
    inside = classes < n_classes
    source_ptr += row * source_stride
    if head is not None:
        raw = _dot_tile(source_ptr, head, classes, inside, TILE, BLOCK_D)
    else:
        raw = tl.load(source_ptr + classes, mask=inside, other=0.0)
    inv_temperature = inverse_temperature(transform, row)
    z = transform_valid(raw.to(tl.float32), classes, inside, transform, inv_temperature)
    z = nan_to_neg_inf(z)
    tile_top = tl.max(z, 0)
    token = tl.min(tl.where(z == tile_top, lane, TILE), 0)
    if not ALL_GREEDY:
        tile_of_lane = tl.zeros([TILE], tl.int32) + tile
        keys_and_seed = _with_seed(keys, seed_low, seed_high, seed_ptr)
        _, _, third, fourth = tile_words(tile_of_lane, row, keys_and_seed)
        kept_z = z
        if cutoff is not None:
            kept_z = keep(z, classes, row, cutoff)
        kept_top = tl.max(kept_z, 0)
        p = tl.exp(kept_z - tl.where(kept_top == -float("inf"), 0.0, kept_top)).to(tl.float64)
        cumulative = tl.cumsum(p, 0)
        whole = tl.max(cumulative, 0)
        # Below the whole sum, and at a class of positive mass, however the products are rounded.
        reached = (cumulative > uniform(third, fourth) * whole) & (p > 0)
        drawn = tl.min(tl.where(reached, lane, TILE), 0)
        final = tl.max(tl.where(p > 0, lane, 0), 0)
        drawn = tl.minimum(drawn, final)
        token = tl.where(by_size, token, drawn)
    chosen = tl.max(tl.where(lane == token, z, -float("inf")), 0)
    log_kept = 0.0
    if cutoff is not None:
        log_kept = tl.where(by_size, 0.0, tl.log(tl.sum(kept, 0)) - lse_above)
    tokens_ptr, logprob_ptr, log_kept_ptr, lse_ptr = sample
    tl.store(tokens_ptr + row, (tile * TILE + token).to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(proper, chosen - base - lse_above, float("nan")))
    tl.store(log_kept_ptr + row, tl.where(proper, log_kept, float("nan")))
    tl.store(lse_ptr + row, lse)


def draw(
    source: Tensor,
    weight: Tensor | None,
    classes: Classes,
    params: RowParams,
    keys: SampleKeys,
    statistics: tuple[Tensor, Tensor],
    cutoff: tuple[Tensor, Tensor] | None = None,
    kept_statistics: tuple[Tensor, Tensor] | None = None,
) -> Sample:
    """Draw by the statistics of tiles; `source` is logits, or hidden states with `weight`."""
    rows = source.shape[0]
    (tokens,) = empties(1, rows, like=source, dtype=torch.int64)
    fields = empties(3, rows, like=source)
    if rows:
        step = step_tensor(keys)
        step_stride = 0 if step.numel() == 1 else step.stride(0)
        in_memory = isinstance(keys.seed, Tensor)
        low, high = (0, 0) if in_memory else key_words(keys.seed)
        tiles, depth, warps = DRAW_BLOCK
        launch(_draw_kernel, (rows,), source)(
            source,
            source.stride(0),
            head=None if weight is None else (weight, weight.stride(0), weight.shape[1]),
            transform=kernel_transform(classes, params),
            greedy_ptr=None if params.greedy is None else params.greedy.view(torch.uint8),
            statistics=statistics,
            cutoff=cutoff,
            kept_statistics=kept_statistics,
            keys=(keys.rows.contiguous(), step, step_stride),
            seed_low=_signed(low),
            seed_high=_signed(high),
            seed_ptr=keys.seed if in_memory else None,
            sample=(tokens, *fields),
            n_classes=classes.count,
            n_tiles=statistics[0].shape[1],
            ALL_GREEDY=params.all_greedy,
            TILE=TILE,
            BLOCK_TILES=min(tiles, triton.next_power_of_2(statistics[0].shape[1])),
            BLOCK_D=depth,
            num_warps=warps,
        )
    return Sample(tokens, *fields)


def sample_rows(raw: Tensor, classes: Classes, params: RowParams, keys: SampleKeys) -> Sample:
    """Draw from raw logits [B, >= count] of bf16, fp16 or fp32, which are only read."""
    raw = raw if raw.stride(1) == 1 else raw.contiguous()
    statistics = tile_statistics(raw, classes, params)
    cutoff, kept_statistics = None, None
    if params.filtered:
        cutoff = cutoffs(raw, classes, params, statistics)
        kept_statistics = tile_statistics(raw, classes, params, cutoff)
    return draw(raw, None, classes, params, keys, statistics, cutoff, kept_statistics)


def _signed(word: int) -> int:
    """A 32-bit word as Triton passes it, so that no seed compiles another kernel."""
    return word - (1 << 32) if word >> 31 else word
