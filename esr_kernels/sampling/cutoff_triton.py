"""The Triton kernel that finds what top-k, top-p and min-p keep of a row, without sorting it.

Each filter keeps a first part of the classes in the order (largest logit first, then lowest id), so
what is kept is told by a threshold and the last class that is kept at it. One program per row
bisects over the order of the fp32 numbers, at most 32 passes for each of top-k and top-p. They run
over the candidates that `sampling_candidates_triton` lists, or, where a flat distribution leaves
more of them than the list holds, over the row: exact either way.
"""

import triton
import triton.language as tl

from esr_kernels.sampling.candidates_triton import filters_of, from_order, load_block, order_of


@triton.jit
def _load_some(start, source, chain, BLOCK: tl.constexpr):
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
        z = load_block(row_ptr, start, n_classes, chain, BLOCK)
    return z, classes, exists


@triton.jit
def _count_and_mass(least, top, source, chain, BLOCK: tl.constexpr):
    """How many logits of `source` are at least `least`, and their mass over exp(top)."""
    number = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, source[4], BLOCK):
        z, _, exists = _load_some(start, source, chain, BLOCK)
        among = (z >= least) & exists
        number += among.to(tl.int32)
        mass += tl.where(among, tl.exp(z - top), 0.0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def _cutoff_kernel(
    logits_ptr,
    logits_stride,
    bias_ptr,
    invalid_ptr,
    inv_temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    values_ptr,
    ids_ptr,
    counts_ptr,
    tops_ptr,
    totals_ptr,
    bounds_ptr,
    threshold_ptr,
    last_ptr,
    n_classes,
    n_tiles,
    scale,
    softcap,
    RANKED: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of a row and the last class that is kept at it."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(tops_ptr + row)
    lowest = tl.full((), -float("inf"), tl.float32)
    if min_p_ptr is not None:
        lowest = top + tl.log(tl.load(min_p_ptr + row))
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
            inv_temperature = 1.0
            if inv_temperature_ptr is not None:
                inv_temperature = tl.load(inv_temperature_ptr + row)
            chain = (bias_ptr, invalid_ptr, scale, softcap, inv_temperature)
            k, p = filters_of(row, top_k_ptr, top_p_ptr, n_classes)
            # From the bound to one more than the largest logit; int64 holds the sum of any two.
            low = order_of(tl.load(bounds_ptr + row)).to(tl.int64)
            above_top = order_of(top).to(tl.int64) + 1
            # Of the classes at the edge in `low`, so many are kept; the first filter keeps `whole`.
            at_edge = tl.full((), 0, tl.int32) + n_classes
            whole = tl.load(totals_ptr + row)
            if top_k_ptr is not None:
                high = tl.where(k < n_classes, above_top, low)
                while high - low > 1:
                    middle = (low + high) >> 1
                    number, _ = _count_and_mass(from_order(middle), top, source, chain, BLOCK)
                    enough = number >= k
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                if k < n_classes:
                    above, mass_above = _count_and_mass(
                        from_order(low + 1), top, source, chain, BLOCK
                    )
                    at_edge = k - above
                    whole = mass_above + at_edge * tl.exp(from_order(low) - top)
            if top_p_ptr is not None:
                wanted = p * whole
                at_k = low
                mass_above = tl.full((), -1.0, tl.float32)
                high = tl.where(p < 1.0, above_top, low)
                while high - low > 1:
                    middle = (low + high) >> 1
                    _, mass = _count_and_mass(from_order(middle), top, source, chain, BLOCK)
                    enough = mass >= wanted
                    low = tl.where(enough, middle, low)
                    high = tl.where(enough, high, middle)
                    # In the end `high` is the next number above the edge.
                    mass_above = tl.where(enough, mass_above, mass)
                if p < 1.0:
                    # Nothing lies above the largest logit.
                    mass_above = tl.maximum(mass_above, 0.0)
                    missing = tl.ceil((wanted - mass_above) / tl.exp(from_order(low) - top))
                    missing = tl.maximum(tl.minimum(missing, 1.0 * n_classes), 1.0).to(tl.int32)
                    at_edge = tl.where(low > at_k, missing, tl.minimum(missing, at_edge))
            edge = from_order(low)
            at_edge = tl.where(lowest > edge, n_classes, at_edge)
            threshold = tl.maximum(edge, lowest)
            # The class at which the ties that are kept end.
            last = tl.full((), -1, tl.int32)
            ties = 0
            for start in range(0, count, BLOCK):
                z, classes, exists = _load_some(start, source, chain, BLOCK)
                tied = ((z == threshold) & exists).to(tl.int32)
                rank = ties + tl.cumsum(tied, 0)
                fits = (tied > 0) & (rank <= at_edge)
                last = tl.maximum(last, tl.max(tl.where(fits, classes, -1), 0))
                ties += tl.sum(tied, 0)
    tl.store(threshold_ptr + row, threshold)
    tl.store(last_ptr + row, last)
