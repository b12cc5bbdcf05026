"""Maxima and log-sums of tiles of 256 fp32 logits in C."""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.cpu import structures
from esr_kernels.cpu.library import library
from esr_kernels.cpu.parallel_for import parallel_for


def supports_tiles(logits: Tensor) -> bool:
    """Whether `tile_logsumexp` takes these logits."""
    plain = logits.device.type == "cpu" and logits.dtype == torch.float32
    return plain and logits.is_contiguous() and library() is not None


def tile_logsumexp(tiled: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima, log of the sums of exp(z - maximum)) of tiles [..., 256]."""
    tiled = tiled.resolve_neg()
    maxima, log_sums = tiled.new_empty(2, *tiled.shape[:-1]).unbind()
    arguments = structures.TileLogsumexp(tiled.data_ptr(), maxima.data_ptr(), log_sums.data_ptr())
    parallel_for("tile_logsumexp", arguments, maxima.numel(), tiled.shape[-1])
    return maxima, log_sums
