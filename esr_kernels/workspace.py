"""Buffers for logits that outlive a call, on CPU.

PyTorch's CUDA allocator keeps what is freed; its CPU allocator gives it back to the system, and
touching fresh memory costs a page fault every 4 KiB, which a loss of a few chunks feels. So each
thread keeps the largest buffer that it needed under each name. `release_workspace` frees them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


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
        buffer = _buffers.by_key[name, dtype] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)


def release_workspace() -> None:
    """Free the buffers that CPU calls of this thread have kept."""
    _buffers.by_key.clear()
