"""The Triton kernel that finds what top-k, top-p and min-p keep of a row, without sorting it.

Each filter keeps a first part of the classes in the order (largest logit first, then lowest id), so
what is kept is told by a threshold and the last class that is kept at it. One program per row
bisects over the order of the fp32 numbers: 32 passes for each of top-k and top-p at most, over a
row that the cache holds, with nothing written but the answer.
"""

import triton
import triton.language as tl

from esr_kernels.sampling_kernels_triton import transformed


@triton.jit
def _order(z):
    """fp32 -> int32 in the same order; both zeros are 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _from_order(order):
    """The inverse of `_order`."""
    order = order.to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _load_block(
    row_ptr,
    bias_ptr,
    invalid_ptr,
    start,
    n_classes,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    classes = start + tl.arange(0, BLOCK)
    inside = classes < n_classes
    raw = tl.load(row_ptr + classes, mask=inside, other=0.0).to(tl.float32)
    return transformed(
        raw,
        bias_ptr,
        invalid_ptr,
        classes,
        inside,
        scale,
        softcap,
        inv_temperature,
        HAS_BIAS,
        HAS_INVALID,
        HAS_SOFTCAP,
    )


@triton.jit
def _count_and_mass(
    row_ptr,
    bias_ptr,
    invalid_ptr,
    least,
    top,
    n_classes,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many logits of a row are at least `least`, and their mass over exp(top)."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_classes, BLOCK):
        z = _load_block(
            row_ptr,
            bias_ptr,
            invalid_ptr,
            start,
            n_classes,
            scale,
            softcap,
            inv_temperature,
            HAS_BIAS,
            HAS_INVALID,
            HAS_SOFTCAP,
            BLOCK,
        )
        among = (z >= least) & (start + tl.arange(0, BLOCK) < n_classes)
        count += among.to(tl.int32)
        mass += tl.where(among, tl.exp(z - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


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
    maxima_ptr,
    threshold_ptr,
    last_ptr,
    n_classes,
    n_tiles,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_INVALID: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of a row and the last class that is kept at it.

    Each edge is found by bisection over the order of the fp32 numbers: at most 32 passes over the
    row, exact whatever the distribution.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    inv_temperature = 1.0
    if HAS_TEMPERATURE:
        inv_temperature = tl.load(inv_temperature_ptr + row)
    top = -float("inf")
    for start in range(0, n_tiles, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        maxima = tl.load(
            maxima_ptr + row * n_tiles + tiles, mask=tiles < n_tiles, other=-float("inf")
        )
        top = tl.maximum(top, tl.max(maxima, 0))

    k = n_classes
    if HAS_TOP_K:
        asked = tl.load(top_k_ptr + row)
        k = tl.where((asked > 0) & (asked < n_classes), asked, n_classes).to(tl.int32)
    p = 1.0
    if HAS_TOP_P:
        p = tl.load(top_p_ptr + row)
    threshold = tl.full((), -float("inf"), tl.float32)
    at_threshold = tl.full((), 0, tl.int32) + n_classes
    # Rows without a distribution are not drawn from: nothing to find in them.
    usable = (top > -float("inf")) & (top < float("inf"))
    if usable & ((k < n_classes) | (p < 1.0)):
        # From -inf to one more than the largest logit; int64 holds the sum of any two.
        low = tl.full((), LOWEST, tl.int64)
        above_top = _order(top).to(tl.int64) + 1
        if HAS_TOP_K:
            high = tl.where(k < n_classes, above_top, low)
            while high - low > 1:
                middle = (low + high) >> 1
                count, _ = _count_and_mass(
                    row_ptr,
                    bias_ptr,
                    invalid_ptr,
                    _from_order(middle),
                    top,
                    n_classes,
                    scale,
                    softcap,
                    inv_temperature,
                    HAS_BIAS,
                    HAS_INVALID,
                    HAS_SOFTCAP,
                    BLOCK,
                )
                enough = count >= k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
        # `low` is where the k-th logit lies: above it all, at it as many as are missing.
        edge = _from_order(low)
        above, mass_above = _count_and_mass(
            row_ptr,
            bias_ptr,
            invalid_ptr,
            _from_order(low + 1),
            top,
            n_classes,
            scale,
            softcap,
            inv_temperature,
            HAS_BIAS,
            HAS_INVALID,
            HAS_SOFTCAP,
            BLOCK,
        )
        at_threshold = k - above
        if HAS_TOP_P:
            wanted = p * (mass_above + at_threshold * tl.exp(edge - top))
            high = tl.where(p < 1.0, above_top, low)
            while high - low > 1:
                middle = (low + high) >> 1
                _, mass = _count_and_mass(
                    row_ptr,
                    bias_ptr,
                    invalid_ptr,
                    _from_order(middle),
                    top,
                    n_classes,
                    scale,
                    softcap,
                    inv_temperature,
                    HAS_BIAS,
                    HAS_INVALID,
                    HAS_SOFTCAP,
                    BLOCK,
                )
                enough = mass >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
                # In the end `high` is the next number above the edge.
                mass_above = tl.where(enough, mass_above, mass)
            at_k = _order(edge).to(tl.int64)
            edge = _from_order(low)
            mass_above = tl.where(high == above_top, 0.0, mass_above)
            missing = tl.ceil((wanted - mass_above) / tl.exp(edge - top))
            missing = tl.maximum(tl.minimum(missing, 1.0 * n_classes), 1.0).to(tl.int32)
            missing = tl.where(low > at_k, missing, tl.minimum(missing, at_threshold))
            at_threshold = tl.where(p < 1.0, missing, at_threshold)
        threshold = edge
    if HAS_MIN_P:
        lowest = top + tl.log(tl.load(min_p_ptr + row))
        at_threshold = tl.where(lowest > threshold, n_classes, at_threshold)
        threshold = tl.maximum(threshold, lowest)

    # The class at which the ties that are kept end.
    last = -1
    ties = 0
    for start in range(0, n_classes, BLOCK):
        z = _load_block(
            row_ptr,
            bias_ptr,
            invalid_ptr,
            start,
            n_classes,
            scale,
            softcap,
            inv_temperature,
            HAS_BIAS,
            HAS_INVALID,
            HAS_SOFTCAP,
            BLOCK,
        )
        tied = (z == threshold).to(tl.int32)
        rank = ties + tl.cumsum(tied, 0)
        fits = (tied > 0) & (rank <= at_threshold)
        last = tl.maximum(last, tl.max(tl.where(fits, start + tl.arange(0, BLOCK), -1), 0))
        ties += tl.sum(tied, 0)
    tl.store(threshold_ptr + row, threshold)
    tl.store(last_ptr + row, last)
