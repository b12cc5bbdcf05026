"""Buffers for logits, and the default of their size in bytes.

PyTorch's CUDA allocator keeps freed memory. Its CPU allocator returns it to the system, and
touching fresh memory costs a page fault every 4 KiB. So on CPU each thread keeps the largest buffer
that it has used under each name; `release_workspace` frees them. Rows are padded so that matrix
products write them at full speed.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from esr_kernels import cpu

_MIB = 1 << 20
_DEFAULT_BUDGET = {"cuda": 2048 * _MIB, "cpu": 320 * _MIB}


def default_memory_budget(device: str | torch.device) -> int:
    """Bytes that an op may use beyond inputs and gradients if the caller gives no budget."""
    return _DEFAULT_BUDGET["cpu" if torch.device(device).type == "cpu" else "cuda"]


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_key: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def borrow(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, valid until the next `borrow` of `name` in this thread."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel()
    buffer = _buffers.by_key.get((name, dtype))
    if buffer is None or buffer.numel() < size:
        _buffers.by_key.pop((name, dtype), None)
        # Made outside of inference mode, whose tensors no later call could write to.
        with torch.inference_mode(False):
            buffer = cpu.on_huge_pages(torch.empty(size, dtype=dtype))
        _buffers.by_key[name, dtype] = buffer
    return buffer[:size].view(shape)


# A projection into rows that do not start at a multiple of 64 bytes takes up to 1.45 times as long
# (MKL, V = 50,257), so rows are padded: to 128 bytes of fp32, 64 of a 16-bit type.
_ROW_ALIGNMENT = 32


def row_stride(columns: int) -> int:
    """Elements from one row of logits to the next."""
    return -(-columns // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def borrow_rows(
    name: str, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`borrow` for logits [rows, columns], which have padding between their rows."""
    rows, columns = shape
    return borrow(name, (rows, row_stride(columns)), device, dtype)[:, :columns]


def release_workspace() -> None:
    """Free the buffers that CPU calls of this thread have kept."""
    _buffers.by_key.clear()
