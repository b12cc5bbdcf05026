"""Checks of arguments; each error names the argument, what it was and what is allowed."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul, triton_installed
from esr_kernels.common.rows import to_device
from esr_kernels.common.transform import LogitTransform

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
REDUCTIONS = ("sum", "mean", "none")
# Kernels hold scale, softcap and temperature in fp32, where anything larger is infinite.
_LARGEST = torch.finfo(torch.float32).max
PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # no DTensor, nor what a tracer takes


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


def is_dtensor(*tensors: object) -> bool:
    """Whether one of them is a DTensor; imports nothing."""
    for x in tensors:
        if x is None or type(x) in PLAIN_TENSORS:
            continue  # To find that one of them lacks an attribute takes a microsecond.
        if isinstance(x, Tensor) and hasattr(x, "full_tensor"):
            return True
    return False


class Head(NamedTuple):
    """Checked operands: of one dtype, contiguous, and the number of classes."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    classes: int


def check_head(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    num_classes: int | None,
    impl: str,
) -> Head:
    """Raise on the first argument that cannot be used, else return the operands ready for use.

    `prefix` precedes "hidden" and "weight" in the names of the caller's arguments; `transform` is
    the result of `checked_transform`.
    """
    hidden_name, weight_name = f"{prefix}hidden", f"{prefix}weight"
    rows_of_head = check_operands(hidden_name, hidden, weight_name, weight)
    check_bias("bias", bias, hidden, rows_of_head)
    if rows_of_head == 0:
        raise ValueError(f"{weight_name} must have at least one row")
    classes = rows_of_head if num_classes is None else num_classes
    if not isinstance(classes, int) or isinstance(classes, bool) or not 0 < classes <= rows_of_head:
        raise ValueError(
            f"num_classes must be an integer from 1 to {rows_of_head}, the rows of {weight_name}, "
            f"got {num_classes!r}"
        )
    check_impl(impl, hidden_name, hidden)
    hidden, weight = ready(hidden_name, hidden, weight_name, weight)
    return Head(hidden, weight, None if bias is None else bias.contiguous(), transform, classes)


def check_operands(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> int:
    """Raise unless the two are matrices of one model on one device; returns the head's rows."""
    for name, value in ((hidden_name, hidden), (weight_name, weight)):
        check_tensor(name, value, dtypes=FLOATS)
        if is_dtensor(value):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor; gather it once for many calls, by "
                "full_tensor() or with FSDP2 by unshard()"
            )
        if value.is_meta:
            raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
        if value.dim() != 2:
            raise ValueError(
                f"{name} must have 2 dimensions, got shape {list(value.shape)}; "
                "flatten batch and time into one token dimension"
            )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name} must have {hidden.shape[1]} columns as {hidden_name} has, "
            f"got shape {list(weight.shape)}"
        )
    if hidden.shape[1] == 0:
        raise ValueError(f"{hidden_name} and {weight_name} must have at least one column, got 0")
    check_tensor(weight_name, weight, like=hidden)
    return weight.shape[0]


def check_bias(name: str, bias: Tensor | None, hidden: Tensor, rows: int) -> None:
    """Raise unless `bias` is None or a floating-point vector for `rows` classes."""
    if bias is None:
        return
    check_tensor(name, bias, shape=(rows,), like=hidden)
    if not bias.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {bias.dtype}")


def ready(
    hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Checked operands in one dtype, that of autocast where it is on, with contiguous rows."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"{hidden_name} and {weight_name} must have the same dtype outside of autocast, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    return hidden.contiguous(), weight.contiguous()


def checked_transform(
    scale: tuple[str, float], softcap: tuple[str, float | None], temperature: tuple[str, float]
) -> LogitTransform:
    """The transform of the logits from (argument name, value) pairs; raises on a bad value."""
    for name, value in (temperature, scale, softcap):
        if value is not None or name != softcap[0]:
            check_number(name, value)
    # Comparisons only, which NaN fails too: a compiler may have a symbol in place of the number.
    if not 0 < temperature[1] <= _LARGEST:
        raise ValueError(f"{temperature[0]} must be finite and above 0, got {temperature[1]}")
    if not 0 < abs(scale[1]) <= _LARGEST:
        raise ValueError(f"{scale[0]} must be finite and not 0, got {scale[1]}")
    if softcap[1] is not None and not 0 < softcap[1] <= _LARGEST:
        raise ValueError(f"{softcap[0]} must be None or finite and above 0, got {softcap[1]}")
    return LogitTransform(scale[1], softcap[1], temperature[1])


def check_impl(impl: str, hidden_name: str, hidden: Tensor) -> None:
    """Raise unless `impl` is known and can compute on these operands."""
    one_of("impl", impl, IMPLEMENTATIONS)
    if impl == "auto" and hidden.device.type != "cpu" and not torch.compiler.is_compiling():
        triton_installed.warn_if_not()
    if impl != "triton":
        return
    if not triton_installed.TRITON:
        raise ValueError("impl='triton' needs Triton, which is not installed: pip install triton")
    if hidden.dtype == torch.float64:
        raise TypeError(f"impl='triton' computes in fp32, got {hidden_name} of float64")
    if hidden.device.type == "cpu" and not _triton_runs_on_cpu():
        raise ValueError(
            "impl='triton' needs a GPU, got CPU tensors; use impl='auto' or 'torch', or set "
            "TRITON_INTERPRET=1 before importing Triton to run the kernels in its interpreter"
        )


def checked_token_weights(token_weights: Tensor | None, hidden: Tensor) -> Tensor | None:
    """The weights [T] of the rows of `hidden`, on its device, in the dtype of its logits,
    contiguous: kernels read them without a stride."""
    if token_weights is None:
        return None
    check_tensor("token_weights", token_weights, shape=(hidden.shape[0],))
    if token_weights.is_complex() or token_weights.requires_grad:
        raise TypeError("token_weights must be real and carry no gradient; detach them")
    check_weight_values(token_weights)
    dtype = matmul.logits_dtype(hidden.dtype)
    return to_device(token_weights.to(dtype), hidden.device).contiguous()


def check_weight_values(token_weights: Tensor) -> None:
    """Raise unless every weight is finite; on a GPU they are not read."""
    if not can_read_values(token_weights):
        return
    bad = ~token_weights.isfinite()
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"token_weights must be finite, got {float(token_weights[at])} at position {at}"
        )


def can_read_values(tensor: Tensor) -> bool:
    """Whether the host can read values without synchronising, and not while a compiler traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _triton_runs_on_cpu() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1" or matmul.KERNELS_ON_CPU
