"""Whether Triton is installed. A CUDA or ROCm build of PyTorch brings its own; without Triton,
PyTorch computes on a GPU what the kernels would."""

from __future__ import annotations

import functools
import importlib.util
import logging

TRITON = importlib.util.find_spec("triton") is not None
_log = logging.getLogger(__name__)


@functools.cache
def warn_if_not() -> None:
    """Say once that a GPU's kernels are missing."""
    if not TRITON:
        _log.warning("Triton is not installed; PyTorch is used on the GPU instead, which is slower")
