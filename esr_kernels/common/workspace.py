"""Buffers for logits: rows that GEMMs write at full speed, and that outlive a call on CPU.

PyTorch's CUDA allocator keeps what is freed; its CPU allocator gives it back to the system, and
touching fresh memory costs a page fault every 4 KiB, which a loss of a few chunks feels. So each
thread keeps the largest buffer that it needed under each name. `release_workspace` frees them.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch
from torch import Tensor

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux has them
_LARGE = 4 << 20


def on_huge_pages(fresh: Tensor) -> Tensor:
    """The same memory, not touched yet, which Linux is asked to hand out 2 MiB at a time.

    A fresh gradient of a head of 150,000 classes costs a fault for each of its 38,000 small pages.
    NumPy asks for the same. A refusal does no harm.
    """
    size = fresh.numel() * fresh.element_size()
    if fresh.device.type == "cpu" and size >= _LARGE and _HUGE_PAGES is not None:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (fresh.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(_HUGE_PAGES)
        )
    return fresh


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_key: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def borrow(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the device of `like`, valid until the next `borrow` of `name`."""
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=like.device)
    size = torch.Size(shape).numel()
    buffer = _buffers.by_key.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        _buffers.by_key.pop((name, dtype), None)
        # Made outside of inference mode, whose tensors no later call could write to.
        with torch.inference_mode(False):
            buffer = _buffers.by_key[name, dtype] = on_huge_pages(torch.empty(size, dtype=dtype))
    return buffer[:size].view(shape)


# A projection into rows that do not start at a multiple of 64 bytes takes up to 1.45 times as long
# (MKL, V = 50,257), so rows are padded: to 128 bytes of fp32, 64 of a 16-bit type.
_ROW_ALIGNMENT = 32


def row_stride(columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def borrow_rows(name: str, rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`borrow` for [rows, columns] logits, which have padding between their rows."""
    return borrow(name, (rows, row_stride(columns)), like, dtype)[:, :columns]


def release_workspace() -> None:
    """Free the buffers that CPU calls of this thread have kept."""
    _buffers.by_key.clear()
