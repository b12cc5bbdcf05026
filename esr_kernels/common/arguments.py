"""Checks of arguments; each error names the argument, what it was and what is allowed."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
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


def checked_ids(name: str, value: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Distinct row numbers that the host knows: integers, or a vector of int64 on the CPU.

    Raises:
        TypeError, ValueError: other things, an id below 0, an id twice, or none at all.
    """
    if isinstance(value, Tensor):
        check_tensor(name, value, dtypes=(torch.int64,), shape=("ids",))
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            raise ValueError(
                f"{name} must lie on the CPU, and be no tensor under torch.compile: "
                "the host reads it; pass a tuple of integers"
            )
        value = value.tolist()
    try:
        ids = tuple(operator.index(row) for row in value)
    except TypeError as error:
        raise TypeError(
            f"{name} must be integers or an int64 tensor on the CPU, got {value!r}"
        ) from error
    if not ids:
        raise ValueError(f"{name} must not be empty")
    if min(ids) < 0:
        raise ValueError(f"{name} must be 0 or more, got {min(ids)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name} must be distinct, got {list(ids)}")
    return ids


def check_memory_budget(memory_budget: int | None) -> None:
    """Raise ValueError unless it is None or a positive whole number of bytes."""
    whole = isinstance(memory_budget, int) and not isinstance(memory_budget, bool)
    if memory_budget is not None and not (whole and memory_budget > 0):
        raise ValueError(
            f"memory_budget must be a positive whole number of bytes, got {memory_budget!r}"
        )


def check_tensor(
    name: str,
    value: object,
    *,
    dtypes: tuple[torch.dtype, ...] = (),
    shape: tuple[int | str, ...] | None = None,
    like: Tensor | None = None,
) -> None:
    """Raise unless `value` is a tensor of one of `dtypes`, of `shape` and on the device of `like`.

    A string in `shape` is the name of a dimension of any size.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if dtypes and value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        several = "one of " if len(dtypes) > 1 else ""
        raise TypeError(f"{name} must be {several}{allowed}, got {value.dtype}")
    if shape is not None:
        sizes = zip(value.shape, shape, strict=False)
        fits = all(isinstance(wanted, str) or size == wanted for size, wanted in sizes)
        if value.dim() != len(shape) or not fits:
            allowed = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have shape [{allowed}], got {list(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on device {like.device}, got {value.device}")
