"""A tensor times a factor that only the GPU knows: in place, or added to another.

PyTorch's kernels for a tensor of one element load and store one element at a time, at a third of
the bandwidth of an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import ceil_div, launch, processors

# (elements at a time, warps): 8 elements of a 16-bit type a thread, and how many programs an SM.
_BLOCK, _WARPS, _PROGRAMS = 2048, 8, 8


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, total_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    # The upstream gradient of a loss is mostly 1; the host cannot know that without waiting.
    needed = factor != 1.0
    if total_ptr is not None:
        needed = True
    if needed:
        lane = tl.arange(0, BLOCK)
        zero = tl.zeros([1], tl.int64)  # offsets are of 64 bits
        for start in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            at = (zero + start) * BLOCK + lane
            x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32) * factor
            if total_ptr is None:
                tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < size)
            else:
                total = tl.load(total_ptr + at, mask=at < size, other=0.0).to(tl.float32)
                tl.store(total_ptr + at, (total + x).to(total_ptr.dtype.element_ty), mask=at < size)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, for contiguous `x` of up to 32 bits an element and a `factor` of one element.

    The product is in fp32, rounded once. A factor of exactly 1 costs a launch and no traffic;
    otherwise `x` is read and written once.
    """
    _launch(x, factor, None)


def add_scaled_(total: Tensor, x: Tensor, factor: Tensor) -> None:
    """total += x * factor, as `scale_`; both contiguous, of the same shape."""
    _launch(x, factor, total)


def _launch(x: Tensor, factor: Tensor, total: Tensor | None) -> None:
    if x.numel():
        programs = min(ceil_div(x.numel(), _BLOCK), _PROGRAMS * processors(x.device))
        launch(_scale_kernel, (programs,), x)(
            x, factor, total, size=x.numel(), BLOCK=_BLOCK, num_warps=_WARPS
        )
