"""Maxima and log-sums of tiles of fp32 logits on CPU by `tiles_native.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from esr_kernels.cpu.library import library, over_rows


class _Tiles(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("logits", "maxima", "log_sums")]


def serves(logits: Tensor) -> bool:
    """Whether the compiled pass takes these logits."""
    plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    return plain and logits.is_contiguous() and library() is not None


def tile_sums(tiled: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima, log of the sums of exp(z - maximum)) of tiles [..., 256]."""
    tiled = tiled.resolve_neg()
    maxima, log_sums = tiled.new_empty(2, *tiled.shape[:-1]).unbind()
    what = _Tiles(tiled.data_ptr(), maxima.data_ptr(), log_sums.data_ptr())
    over_rows("tile_sums", what, maxima.numel(), tiled.shape[-1])
    return maxima, log_sums
