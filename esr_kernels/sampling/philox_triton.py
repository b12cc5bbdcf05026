"""`philox` in Triton: the same words bit for bit, and variates by the same formulas."""

import triton
import triton.language as tl

from esr_kernels.common.logits_triton import log1p


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10; see `philox`."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def tile_words(tiles, row, keys):
    """The four words of a row's tiles; see `philox.tile_words`.

    `keys` is (rows_ptr, step_ptr, step_stride, seed_low, seed_high).
    """
    rows_ptr, step_ptr, step_stride, seed_low, seed_high = keys
    name = tl.load(rows_ptr + row)
    step = tl.load(step_ptr + row * step_stride)
    c0 = tiles.to(tl.uint32)
    zero = c0 ^ c0
    return _philox(
        c0,
        zero + step.to(tl.uint32),
        zero + name.to(tl.uint32),
        zero + (name >> 32).to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )


@triton.jit
def gumbel(high, low):
    """A standard Gumbel variate; see `philox.gumbel`."""
    upper = high > 0x7FFFFFFF
    high = tl.where(upper, high ^ 0xFFFFFFFF, high).to(tl.float32)
    low = tl.where(upper, low ^ 0xFFFFFFFF, low).to(tl.float32)
    distance = high * 2.3283064365386963e-10 + (low + 0.5) * 5.421010862427522e-20
    return -tl.log(-tl.where(upper, tl.log(distance), log1p(-distance)))


@triton.jit
def uniform(high, low):
    """A uniform variate of (0, 1) in fp64; see `philox.uniform`."""
    whole = high.to(tl.float64) * 1048576.0 + (low >> 12).to(tl.float64)
    return (whole + 0.5) * 2.220446049250313e-16
