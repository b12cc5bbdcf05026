"""The Triton kernel that lists what the filters may keep of a row, for `sampling_cutoff_triton`.

A bound below every logit that can matter follows from the statistics of the tiles alone; one pass
over the row lists what lies above it. The k largest maxima of tiles are k logits, so the k-th
largest logit is no smaller than the k-th largest maximum. What lies below log(Z (1 - p) / V) has no
more than (1 - p) Z together, so the nucleus ends above.
"""

import triton
import triton.language as tl

from esr_kernels.sampling.kernels_triton import transformed


@triton.jit
def order_of(z):
    """fp32 -> int32 in the same order; both zeros are 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def from_order(order):
    """The inverse of `order_of`."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def load_block(row_ptr, start, n_classes, chain, BLOCK: tl.constexpr):
    """Transformed logits of a block of a row, -inf beyond its classes."""
    classes = start + tl.arange(0, BLOCK)
    inside = classes < n_classes
    raw = tl.load(row_ptr + classes, mask=inside, other=0.0).to(tl.float32)
    return transformed(raw, classes, inside, chain)


@triton.jit
def filters_of(row, top_k_ptr, top_p_ptr, n_classes):
    """(k, p) of a row; n_classes and 1 where off."""
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
    bias_ptr,
    invalid_ptr,
    inv_temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    maxima_ptr,
    log_sums_ptr,
    values_ptr,
    ids_ptr,
    counts_ptr,
    tops_ptr,
    totals_ptr,
    bounds_ptr,
    n_classes,
    n_tiles,
    scale,
    softcap,
    RANKED: tl.constexpr,
    LOWEST: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's maximum, mass over it, bound, and the logits from the bound up in order of class."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_TILES)
    top = -float("inf")
    for start in range(0, n_tiles, BLOCK_TILES):
        exists = start + tile < n_tiles
        at = maxima_ptr + row * n_tiles + start + tile
        top = tl.maximum(top, tl.max(tl.load(at, mask=exists, other=-float("inf")), 0))
    tl.store(tops_ptr + row, top)
    if RANKED:
        total = tl.zeros([BLOCK_TILES], tl.float32)
        for start in range(0, n_tiles, BLOCK_TILES):
            exists = start + tile < n_tiles
            at = row * n_tiles + start + tile
            maxima = tl.load(maxima_ptr + at, mask=exists, other=-float("inf"))
            total += tl.exp(
                maxima - top + tl.load(log_sums_ptr + at, mask=exists, other=-float("inf"))
            )
        mass = tl.sum(total, 0)
        k, p = filters_of(row, top_k_ptr, top_p_ptr, n_classes)
        bound = tl.full((), -float("inf"), tl.float32)
        count = 0
        # Rows without a distribution are not drawn from: nothing to find in them.
        if (mass == mass) & (top > -float("inf")) & ((k < n_classes) | (p < 1.0)):
            if top_k_ptr is not None:
                low = tl.full((), LOWEST, tl.int64)
                high = tl.where(k <= n_tiles, order_of(top).to(tl.int64) + 1, low)
                # Wherever it stops, `low` is a bound; after 20 halvings a close one.
                for _ in range(20):
                    middle = (low + high) >> 1
                    reached = tl.zeros([BLOCK_TILES], tl.int32)
                    for start in range(0, n_tiles, BLOCK_TILES):
                        exists = start + tile < n_tiles
                        at = maxima_ptr + row * n_tiles + start + tile
                        maxima = tl.load(at, mask=exists, other=-float("inf"))
                        reached += ((maxima >= from_order(middle)) & exists).to(tl.int32)
                    enough = (tl.sum(reached, 0) >= k) & (middle > low)
                    high = tl.where(enough, high, middle)
                    low = tl.where(enough, middle, low)
                bound = from_order(low)
            if top_p_ptr is not None:
                # Less a little, so that rounding cannot lift it above the nucleus's edge.
                nucleus = top + tl.log(mass) + tl.log((1.0 - p) / n_classes) - 0.1
                bound = tl.where(k < n_classes, bound, nucleus)
            inv_temperature = 1.0
            if inv_temperature_ptr is not None:
                inv_temperature = tl.load(inv_temperature_ptr + row)
            chain = (bias_ptr, invalid_ptr, scale, softcap, inv_temperature)
            for start in range(0, n_classes, BLOCK):
                z = load_block(logits_ptr + row * logits_stride, start, n_classes, chain, BLOCK)
                classes = start + tl.arange(0, BLOCK)
                listed = ((z >= bound) & (classes < n_classes)).to(tl.int32)
                place = count + tl.cumsum(listed, 0) - listed
                fits = (listed > 0) & (place < CAPACITY)
                tl.store(values_ptr + row * CAPACITY + place, z, mask=fits)
                tl.store(ids_ptr + row * CAPACITY + place, classes, mask=fits)
                count += tl.sum(listed, 0)
        tl.store(totals_ptr + row, mass)
        tl.store(bounds_ptr + row, bound)
        tl.store(counts_ptr + row, count)
