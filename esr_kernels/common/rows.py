"""Selection of the active rows, and the inverse for their results."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`, or the tensor itself, without the host waiting for the copy.

    From memory that may be paged out CUDA copies while the host waits; from pinned memory, which
    PyTorch keeps until the copy is done, it does not.
    """
    leaves_the_cpu = tensor.device.type == "cpu" and device.type == "cuda"
    if leaves_the_cpu and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def active_rows(live: Tensor | None, compact: bool) -> Tensor | None:
    """Indices [n] int64 of the rows where `live` [T] is not 0, or None for all rows.

    Reads values, which synchronises with a GPU: callers set `compact` only if that is free or
    requested.
    """
    if live is None or not compact:
        return None
    mask = live != 0
    return None if bool(mask.all()) else mask.nonzero()[:, 0]


def take_rows(rows: Tensor, active: Tensor | None) -> Tensor:
    """The active rows; all of them for None."""
    return rows if active is None else rows[active]


def spread_rows(rows: Tensor, active: Tensor | None, tokens: int) -> Tensor:
    """The inverse of `take_rows`: [tokens, ...] with 0 in the rows that are not active."""
    if active is None:
        return rows
    return rows.new_zeros(tokens, *rows.shape[1:]).index_copy(0, active, rows)
