"""Buffers for logits, and the default of their size in bytes.

PyTorch's CUDA allocator keeps freed memory. Its CPU allocator returns it to the system, and
touching fresh memory costs a page fault every 4 KiB. So on CPU each thread keeps the largest buffer
that it has used under each name; `release_workspace` frees them. Rows are padded so that matrix
products write them at full speed.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from esr_kernels import cpu

_MIB = 1 << 20
_CPU_BUDGET = 320 * _MIB
# Plans that are made where there is no GPU are for one of 80 GB, half of it free.
_ABSENT_GPU = 40 << 30, 80 << 30


def default_memory_budget(device: str | torch.device) -> int:
    """Bytes that an op may use beyond inputs and gradients if the caller gives no budget.

    On a GPU an eighth of its memory or half of what is free, whichever is less, rounded down to a
    power of two: 8 GiB of 80, if 16 are free. It is settled when first asked for and stays for the
    life of the process, so that equal calls have equal plans; name a `memory_budget` for the same
    plan on every machine. Without a GPU it is that of an 80 GB GPU.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _CPU_BUDGET
    has_gpu = torch.version.cuda or torch.version.hip
    if device.type != "cuda" or not has_gpu or not torch.cuda.is_available():
        return gpu_budget(*_ABSENT_GPU)
    return _budget_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _budget_of_gpu(index: int) -> int:
    free, total = torch.cuda.mem_get_info(index)
    # What PyTorch's allocator has and does not use is free as well.
    cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    return gpu_budget(free + cached, total)


def gpu_budget(free: int, total: int) -> int:
    """The default budget on a GPU with so many bytes; at least 256 MiB."""
    most = max(min(total // 8, free // 2), 256 * _MIB)
    return 1 << (most.bit_length() - 1)


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_key: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def borrow(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor, valid until the next `borrow` of `name` in this thread."""
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)  # faster than of a tuple
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
    stride = row_stride(columns)
    padded = borrow(name, (rows, stride), device, dtype)
    return padded if stride == columns else padded[:, :columns]


def release_workspace() -> None:
    """Free the buffers that CPU calls of this thread have kept."""
    _buffers.by_key.clear()
