"""Triton kernels of the sampler: statistics of tiles, and the draw. Launched by `sampling_triton`.

Logits beyond the classes load as -inf. Offsets of rows are 64-bit: B * V passes 2**31 at 14,135
rows of a Qwen vocabulary. Reductions have a fixed order, so a launch repeats bit for bit.
"""

import triton
import triton.language as tl

from esr_kernels.common.logits_triton import tanh
from esr_kernels.sampling.philox_triton import gumbel, tile_words, uniform


@triton.jit
def transformed(z, classes, inside, chain):
    """Transformed logits of raw ones, -inf where there is no valid class.

    `chain` is (bias_ptr, invalid_ptr, scale, softcap, inv_temperature), the pointers and the
    softcap None for none.
    """
    bias_ptr, invalid_ptr, scale, softcap, inv_temperature = chain
    if bias_ptr is not None:
        z += tl.load(bias_ptr + classes, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if softcap is not None:
        z = tanh(z / softcap) * softcap
    z *= inv_temperature
    if invalid_ptr is not None:
        inside = inside & (tl.load(invalid_ptr + classes, mask=inside, other=1) == 0)
    return tl.where(inside, z, -float("inf"))


@triton.jit
def numbers(z):
    """NaN replaced by -inf, so that a maximum is a number."""
    return tl.where(z == z, z, -float("inf"))


@triton.jit
def _kept(z, classes, threshold, last):
    """-inf over the classes below a row's threshold, and at it beyond its last."""
    return tl.where((z > threshold) | ((z == threshold) & (classes <= last)), z, -float("inf"))


@triton.jit
def _tile_statistics_kernel(
    logits_ptr,
    logits_stride,
    bias_ptr,
    invalid_ptr,
    inv_temperature_ptr,
    threshold_ptr,
    last_ptr,
    maxima_ptr,
    log_sums_ptr,
    n_classes,
    n_tiles,
    scale,
    softcap,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.program_id(1) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    classes = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = classes < n_classes
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    raw = tl.load(logits_ptr + row * logits_stride + classes, mask=inside, other=0.0)
    chain = (bias_ptr, invalid_ptr, scale, softcap, inv_temperature)
    z = transformed(raw.to(tl.float32), classes, inside, chain)
    if threshold_ptr is not None:
        z = _kept(z, classes, tl.load(threshold_ptr + row), tl.load(last_ptr + row))
    top = tl.max(numbers(z), 1)
    # A tile of -inf only must not turn into exp(-inf + inf). NaN and +inf make the sum NaN.
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(z - base[:, None]), 1)
    out = row * n_tiles + tiles
    tl.store(maxima_ptr + out, top, mask=tiles < n_tiles)
    tl.store(log_sums_ptr + out, tl.log(total), mask=tiles < n_tiles)


@triton.jit
def _dot_tile(
    hidden_ptr,
    weight_ptr,
    weight_stride,
    classes,
    inside,
    depth,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of one row and a tile of classes, straight from its hidden state."""
    lane = tl.arange(0, BLOCK_D)
    weight = weight_ptr + classes.to(tl.int64)[:, None] * weight_stride + lane[None, :]
    total = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, depth, BLOCK_D):
        exists = lane < depth - start
        h = tl.load(hidden_ptr + start + lane, mask=exists, other=0.0).to(tl.float32)
        w = tl.load(weight + start, mask=inside[:, None] & exists[None, :], other=0.0)
        total += h[None, :] * w.to(tl.float32)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _draw_kernel(
    source_ptr,
    source_stride,
    weight_ptr,
    weight_stride,
    depth,
    bias_ptr,
    invalid_ptr,
    inv_temperature_ptr,
    greedy_ptr,
    threshold_ptr,
    last_ptr,
    maxima_ptr,
    log_sums_ptr,
    kept_maxima_ptr,
    kept_log_sums_ptr,
    rows_ptr,
    step_ptr,
    step_stride,
    seed_low,
    seed_high,
    tokens_ptr,
    logprob_ptr,
    log_kept_ptr,
    lse_ptr,
    n_classes,
    n_tiles,
    scale,
    softcap,
    FROM_HIDDEN: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Choose a tile of a row by its statistics, then a class in it by its logits."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_TILES)
    first_of_row = row * n_tiles

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
            if threshold_ptr is not None:
                maxima = tl.load(kept_maxima_ptr + at, mask=exists, other=-float("inf"))
                log_sums = tl.load(kept_log_sums_ptr + at, mask=exists, other=-float("inf"))
                kept += tl.exp(maxima - base + log_sums)
            high, low, _, _ = tile_words(
                tiles, rows_ptr, step_ptr, step_stride, row, seed_low, seed_high
            )
            score = numbers(maxima - base + log_sums + gumbel(high, low))
            score = tl.where(exists, score, -float("inf"))
            block_best = tl.max(score, 0)
            block_tile = tl.min(tl.where(score == block_best, tiles, n_tiles), 0)
            drawn_tile = tl.where(block_best > best, block_tile, drawn_tile)
            best = tl.maximum(best, block_best)
    lse_above = tl.log(tl.sum(total, 0))
    lse = base + lse_above
    # A row of NaN, of +inf or of nothing but -inf has no distribution to draw from.
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
    if FROM_HIDDEN:
        raw = _dot_tile(
            source_ptr + row * source_stride,
            weight_ptr,
            weight_stride,
            classes,
            inside,
            depth,
            TILE,
            BLOCK_D,
        )
    else:
        raw = tl.load(source_ptr + row * source_stride + classes, mask=inside, other=0.0)
    inv_temperature = 1.0
    if inv_temperature_ptr is not None:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    chain = (bias_ptr, invalid_ptr, scale, softcap, inv_temperature)
    z = transformed(raw.to(tl.float32), classes, inside, chain)
    z = numbers(z)
    tile_top = tl.max(z, 0)
    token = tl.min(tl.where(z == tile_top, lane, TILE), 0)
    if not ALL_GREEDY:
        level_of = tl.zeros([TILE], tl.int32) + tile
        _, _, third, fourth = tile_words(
            level_of, rows_ptr, step_ptr, step_stride, row, seed_low, seed_high
        )
        kept_z = z
        if threshold_ptr is not None:
            kept_z = _kept(z, classes, tl.load(threshold_ptr + row), tl.load(last_ptr + row))
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
    if threshold_ptr is not None:
        log_kept = tl.where(by_size, 0.0, tl.log(tl.sum(kept, 0)) - lse_above)
    tl.store(tokens_ptr + row, (tile * TILE + token).to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(proper, chosen - base - lse_above, float("nan")))
    tl.store(log_kept_ptr + row, tl.where(proper, log_kept, float("nan")))
    tl.store(lse_ptr + row, lse)
