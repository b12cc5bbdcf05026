"""What all integrations need: is the peer there as it was read, and what its beta means."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from esr_kernels.divergence.losses import JSD, Divergence, ForwardKL, ReverseKL


def require(package: str, least: str, below: str) -> None:
    """Raise ImportError unless least <= the installed version of `package` < below."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"{package} is not installed: pip install '{package}>={least},<{below}'"
        ) from error
    if not _numbers(least) <= _numbers(found) < _numbers(below):
        raise ImportError(f"{package} must be >={least},<{below} for this integration, got {found}")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]


def check_parameters(package: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Raise ImportError unless `function` of `package` has the parameters that were read there."""
    found = list(inspect.signature(function).parameters)
    if found != list(expected):
        raise ImportError(
            f"{package} {importlib.metadata.version(package)}: {function.__qualname__} takes "
            f"{found}, and this integration was written for {list(expected)}; use a version of "
            f"{package} that has these"
        )


def divergence_of(beta: float) -> Divergence:
    """What GKD, TRL and Liger compute for `beta`: 0 forward KL, 1 reverse KL, else JSD(beta)."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be from 0 to 1, got {beta}")
    return ForwardKL() if beta == 0.0 else ReverseKL() if beta == 1.0 else JSD(beta)
