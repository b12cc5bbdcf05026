"""Checks of arguments that are not tensors."""

from __future__ import annotations

import numbers

import torch

IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
REDUCTIONS = ("sum", "mean", "none")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a real number; a compiler's symbol passes for one."""
    if not torch.compiler.is_compiling() and not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")


def check_size(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_memory_budget(memory_budget: int | None) -> None:
    """Raise ValueError unless it is None or a positive whole number of bytes."""
    whole = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (whole and memory_budget > 0):
        raise ValueError(
            f"memory_budget must be a positive whole number of bytes, got {memory_budget!r}"
        )
