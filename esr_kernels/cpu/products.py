"""The order of operands in a projection of few tokens onto many classes.

On an AMD EPYC, hidden @ weight.T takes 0.6 to 1.1 of its time if it is computed as the transpose of
weight @ hidden.T; on an Intel Xeon, 1.3 to 1.9 of it (bench/bench_projection.py). The result is
transposed in strips of classes that stay in the cache. PyTorch is slower at that than the C, so
without the C there is a gain for fewer tokens only.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from esr_kernels.cpu.library import is_enabled, library

STRIP_CLASSES = 1024
_MAX_TOKENS, _MAX_TOKENS_WITHOUT_C = 512, 256


class Allocator(Protocol):
    """An uninitialised tensor that stays valid until the next call with this name."""

    def __call__(
        self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor: ...


def project_transposed(hidden: Tensor, weight: Tensor, out: Tensor, allocate: Allocator) -> bool:
    """Compute out = hidden @ weight.T, all of one dtype, as strips of weight @ hidden.T.

    Returns:
        Whether it did so. False where this order is slower, and `out` is untouched.
    """
    tokens, classes = out.shape
    few = tokens <= _MAX_TOKENS and classes >= 4 * STRIP_CLASSES
    if hidden.device.type != "cpu" or not few or not is_faster():
        return False
    compiled = library() if out.dtype == torch.float32 and out.stride(1) == 1 else None
    if compiled is None and tokens > _MAX_TOKENS_WITHOUT_C:
        return False
    buffer = allocate("transposed", (STRIP_CLASSES, tokens), hidden.device, out.dtype)
    for start in range(0, classes, STRIP_CLASSES):
        rows = weight[start : start + STRIP_CLASSES]
        strip = buffer[: rows.shape[0]]
        torch.mm(rows, hidden.T, out=strip)
        part = out[:, start : start + rows.shape[0]]
        if compiled is None:
            part.copy_(strip.T)
        else:
            transpose_(compiled, strip, part)
    return True


@functools.cache
def is_faster() -> bool:
    """Decided by the processor's maker rather than by a measurement: results must not depend on
    the load of the machine."""
    if not is_enabled():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def transpose_(compiled: ctypes.CDLL, strip: Tensor, out: Tensor) -> None:
    """out [n, m] = strip.T in fp32; `strip` is contiguous, and so are the rows of `out`."""
    compiled.transpose(
        ctypes.c_void_p(strip.data_ptr()),
        ctypes.c_int64(strip.shape[0]),
        ctypes.c_int64(strip.shape[1]),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(out.stride(0)),
    )
