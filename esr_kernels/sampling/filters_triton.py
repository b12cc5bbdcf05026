"""The filters top-k, top-p and min-p in Triton, without sorting.

Each filter keeps the first classes of a row in the order (largest logit first, then lowest id), so
a threshold and the last class kept at the threshold determine the kept classes. Two launches of one
program per row:

candidates  Lists the logits that the filters may keep. The statistics of the tiles give a lower
            bound of those: the k largest maxima of tiles are k logits, so the k-th
            largest logit is no smaller than the k-th largest maximum; and the logits below
            log(Z (1 - p) / V) have a mass of (1 - p) Z or less together, so the nucleus ends above.
            One pass over the row lists the logits above the bound.
cutoff      Bisects over the order of the fp32 numbers, at most 32 passes for each of top-k and
            top-p. They run over the list, or over the row where a flat distribution leaves more
            candidates than the list holds: exact either way.

`filters` is (top_k_ptr, top_p_ptr), None where off for every row; a floor (`params.FLOORS`) is a
threshold of a row that PyTorch computes between the two launches. `candidates` are the
outputs of the first kernel for the second, one entry a row: (values_ptr, ids_ptr, counts_ptr,
tops_ptr, totals_ptr, bounds_ptr), of which the first two have CAPACITY entries a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import launch
from esr_kernels.sampling.params import Classes, RowParams
from esr_kernels.sampling.tiles_triton import (
    empties,
    kernel_transform,
    transform_of_row,
    transform_valid,
)

# (logits of a row at a time, warps). With few rows, each program has its own multiprocessor. The
# pass over a row needs many warps to keep loads in flight; the passes over its list need few.
CANDIDATES_BLOCK = (2048, 16)
CUTOFF_BLOCK = (1024, 8)
# Candidates of a row that are listed; rows with more are read whole. 64 KiB a row.
CAPACITY = 8192
# Maxima of tiles that the first kernel loads at a time.
_BLOCK_TILES = 1024
# The place of -inf in the order of the fp32 numbers.
_LOWEST = -0x7F800001


@triton.jit
def _order_of(z):
    """fp32 -> int32 in the same order; both zeros are 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _from_order(order):
    """The inverse of `_order_of`."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _load_block(row_ptr, start, n_classes, transform, BLOCK: tl.constexpr):
    """Transformed logits of a block of a row, -inf beyond its classes."""
    classes = start + tl.arange(0, BLOCK)
    inside = classes < n_classes
    raw = tl.load(row_ptr + classes, mask=inside, other=0.0).to(tl.float32)
    return transform_valid(raw, classes, inside, transform)


@triton.jit
def _k_and_p(row, filters, n_classes):
    """(top_k, top_p) of a row; n_classes and 1 where off."""
    top_k_ptr, top_p_ptr = filters
    k = tl.full((), 0, tl.int32) + n_classes
    if top_k_ptr is not None:
        asked = tl.load(top_k_ptr + row)
        k = tl.where((asked > 0) & (asked < n_classes), asked, n_classes).to(tl.int32)
    p = tl.full((), 1.0, tl.float32)
    if top_p_ptr is not None:
        p = tl.load(top_p_ptr + row)
    return k, p


@triton.jit
def _candidates_kernel(
    logits_ptr,
    logits_stride,
    transform,
    filters,
    statistics,
    candidates,
    n_classes,
    n_tiles,
    RANKED: tl.constexpr,
    LOWEST: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's maximum, mass over it, bound, and the logits from the bound up in order of class."""
    row = tl.program_id(0).to(tl.int64)
    maxima_ptr, log_sums_ptr = statistics
    values_ptr, ids_ptr, counts_ptr, tops_ptr, totals_ptr, bounds_ptr = candidates
    tile = tl.arange(0, BLOCK_TILES)
    top = -float("inf")
    for start in range(0, n_tiles, BLOCK_TILES):
        exists = start + tile < n_tiles
        at = maxima_ptr + row * n_tiles + start + tile
        top = tl.maximum(top, tl.max(tl.load(at, mask=exists, other=-float("inf")), 0))
    tl.store(tops_ptr + row, top)
    mass = 0.0
    for start in range(0, n_tiles, BLOCK_TILES):
        exists = start + tile < n_tiles
        at = row * n_tiles + start + tile
        maxima = tl.load(maxima_ptr + at, mask=exists, other=-float("inf"))
        log_sums = tl.load(log_sums_ptr + at, mask=exists, other=-float("inf"))
        mass += tl.sum(tl.exp(maxima - top + log_sums), 0)
    tl.store(totals_ptr + row, mass)
    if RANKED:
        k, p = _k_and_p(row, filters, n_classes)
        bound = tl.full((), -float("inf"), tl.float32)
        count = 0
        # Rows without a distribution need no candidates.
        if (mass == mass) & (top > -float("inf")) & ((k < n_classes) | (p < 1.0)):
            if filters[0] is not None:
                low = tl.full((), LOWEST, tl.int64)
                high = tl.where(k <= n_tiles, _order_of(top).to(tl.int64) + 1, low)
                # `low` is a bound at every iteration, and after 20 halvings a close one.
                for _ in range(20):
                    middle = (low + high) >> 1
                    reached = tl.zeros([BLOCK_TILES], tl.int32)
                    for start in range(0, n_tiles, BLOCK_TILES):
                        exists = start + tile < n_tiles
                        at = maxima_ptr + row * n_tiles + start + tile
                        maxima = tl.load(at, mask=exists, other=-float("inf"))
                        reached += ((maxima >= _from_order(middle)) & exists).to(tl.int32)
                    enough = (tl.sum(reached, 0) >= k) & (middle > low)
                    high = tl.where(enough, high, middle)
                    low = tl.where(enough, middle, low)
                bound = _from_order(low)
            if filters[1] is not None:
                # Slightly lower, so that rounding cannot raise it above the edge of the nucleus.
                nucleus = top + tl.log(mass) + tl.log((1.0 - p) / n_classes) - 0.1
                bound = tl.where(k < n_classes, bound, nucleus)
            row_transform = transform_of_row(transform, row)
            for start in range(0, n_classes, BLOCK):
                z = _load_block(
                    logits_ptr + row * logits_stride, start, n_classes, row_transform, BLOCK
                )
                classes = start + tl.arange(0, BLOCK)
                listed = ((z >= bound) & (classes < n_classes)).to(tl.int32)
                place = count + tl.cumsum(listed, 0) - listed
                fits = (listed > 0) & (place < CAPACITY)
                tl.store(values_ptr + row * CAPACITY + place, z, mask=fits)
                tl.store(ids_ptr + row * CAPACITY + place, classes, mask=fits)
                count += tl.sum(listed, 0)
        tl.store(bounds_ptr + row, bound)
        tl.store(counts_ptr + row, count)


@triton.jit
def _load_source(start, source, transform, BLOCK: tl.constexpr):
    """(logits, their classes, whether they exist) of a block of `source`.

    That is (values_ptr, ids_ptr, row_ptr, compact, count, n_classes): the list of a row where it is
    compact, else the row, with `count` entries.
    """
    values_ptr, ids_ptr, row_ptr, compact, count, n_classes = source
    classes = start + tl.arange(0, BLOCK)
    exists = classes < count
    if compact:
        z = tl.load(values_ptr + classes, mask=exists, other=-float("inf"))
        classes = tl.load(ids_ptr + classes, mask=exists, other=0)
    else:
        z = _load_block(row_ptr, start, n_classes, transform, BLOCK)
    return z, classes, exists


@triton.jit
def _count_and_mass(least, top, source, transform, BLOCK: tl.constexpr):
    """How many logits of `source` are at least `least`, and their mass over exp(top)."""
    number = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[4], BLOCK):
        z, _, exists = _load_source(start, source, transform, BLOCK)
        among = (z >= least) & exists
        number += among.to(tl.int32)
        mass += tl.where(among, tl.exp(z - top), 0.0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _cutoff_kernel(
    logits_ptr,
    logits_stride,
    transform,
    filters,
    lowest_ptr,
    candidates,
    cutoff,
    n_classes,
    RANKED: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of a row and the last class that is kept at it."""
    row = tl.program_id(0).to(tl.int64)
    values_ptr, ids_ptr, counts_ptr, tops_ptr, totals_ptr, bounds_ptr = candidates
    top_k_ptr, top_p_ptr = filters
    top = tl.load(tops_ptr + row)
    lowest = tl.full((), -float("inf"), tl.float32)
    if lowest_ptr is not None:
        lowest = tl.load(lowest_ptr + row)
    threshold = lowest
    last = tl.full((), 0, tl.int32) + n_classes
    if RANKED:
        listed = tl.load(counts_ptr + row)
        if listed > 0:
            compact = listed <= CAPACITY
            count = tl.where(compact, listed, n_classes)
            source = (
                values_ptr + row * CAPACITY,
                ids_ptr + row * CAPACITY,
                logits_ptr + row * logits_stride,
                compact,
                count,
                n_classes,
            )
            row_transform = transform_of_row(transform, row)
            k, p = _k_and_p(row, filters, n_classes)
            # From the bound to one more than the largest logit; int64 holds the sum of any two.
            low = _order_of(tl.load(bounds_ptr + row)).to(tl.int64)
            above_top = _order_of(top).to(tl.int64) + 1
            # `at_edge` of the classes at the edge, which is `low`, are kept; `whole` is the mass
            # that top-k keeps, of which top-p keeps a part.
            at_edge = tl.full((), 0, tl.int32) + n_classes
            whole = tl.load(totals_ptr + row)
            if top_k_ptr is not None:
                high = tl.where(k < n_classes, above_top, low)
                while high - low > 1:
                    middle = (low + high) >> 1
                    number, _ = _count_and_mass(
                        _from_order(middle), top, source, row_transform, BLOCK
                    )
                    enough = number >= k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                if k < n_classes:
                    above, mass_above = _count_and_mass(
                        _from_order(low + 1), top, source, row_transform, BLOCK
                    )
                    at_edge = k - above
                    whole = mass_above + at_edge * tl.exp(_from_order(low) - top)
            if top_p_ptr is not None:
                wanted = p * whole
                at_k = low
                mass_above = tl.full((), -1.0, tl.float32)
                high = tl.where(p < 1.0, above_top, low)
                while high - low > 1:
                    middle = (low + high) >> 1
                    _, mass = _count_and_mass(
                        _from_order(middle), top, source, row_transform, BLOCK
                    )
                    enough = mass >= wanted
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                    # In the end `high` is the next number above the edge.
                    mass_above = tl.where(enough, mass_above, mass)
                if p < 1.0:
                    # Nothing lies above the largest logit.
                    mass_above = tl.maximum(mass_above, 0.0)
                    missing = tl.ceil((wanted - mass_above) / tl.exp(_from_order(low) - top))
                    missing = tl.maximum(tl.minimum(missing, 1.0 * n_classes), 1.0).to(tl.int32)
                    at_edge = tl.where(low > at_k, missing, tl.minimum(missing, at_edge))
            edge = _from_order(low)
            at_edge = tl.where(lowest > edge, n_classes, at_edge)
            threshold = tl.maximum(edge, lowest)
            # The last of the ties that are kept.
            last = tl.full((), -1, tl.int32)
            ties = 0
            for start in range(0, count, BLOCK):
                z, classes, exists = _load_source(start, source, row_transform, BLOCK)
                tied = ((z == threshold) & exists).to(tl.int32)
                rank = ties + tl.cumsum(tied, 0)
                fits = (tied > 0) & (rank <= at_edge)
                last = tl.maximum(last, tl.max(tl.where(fits, classes, -1), 0))
                ties += tl.sum(tied, 0)
    threshold_ptr, last_ptr = cutoff
    tl.store(threshold_ptr + row, threshold)
    tl.store(last_ptr + row, last)


def cutoffs(
    raw: Tensor, classes: Classes, params: RowParams, statistics: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(threshold fp32, last class kept at it int32), each [B]."""
    rows, tiles = statistics[0].shape
    threshold, tops, totals, bounds = empties(4, rows, like=raw)
    last, counts = empties(2, rows, like=raw, dtype=torch.int32)
    if not rows:
        return threshold, last
    ranked = params.ranked
    widest = triton.next_power_of_2(classes.count)
    capacity = min(CAPACITY, widest) if ranked else 1
    (values,) = empties(1, rows, capacity, like=raw)
    (ids,) = empties(1, rows, capacity, like=raw, dtype=torch.int32)
    shared = {
        "transform": kernel_transform(classes, params),
        "filters": (params.top_k, params.top_p),
        "candidates": (values, ids, counts, tops, totals, bounds),
        "n_classes": classes.count,
        "RANKED": ranked,
        "CAPACITY": capacity,
    }
    launch(_candidates_kernel, (rows,), raw)(
        raw,
        raw.stride(0),
        statistics=statistics,
        n_tiles=tiles,
        LOWEST=_LOWEST,
        BLOCK_TILES=min(_BLOCK_TILES, triton.next_power_of_2(tiles)),
        BLOCK=min(CANDIDATES_BLOCK[0], widest),
        num_warps=CANDIDATES_BLOCK[1],
        **shared,
    )
    launch(_cutoff_kernel, (rows,), raw)(
        raw,
        raw.stride(0),
        lowest_ptr=params.lowest(tops, tops + totals.log()) if params.floors else None,
        cutoff=(threshold, last),
        BLOCK=min(CUTOFF_BLOCK[0], widest),
        num_warps=CUTOFF_BLOCK[1],
        **shared,
    )
    return threshold, last
