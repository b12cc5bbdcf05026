"""The public boundary of `linear_divergence`: what is accepted, and the error for what is not."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from esr_kernels.gemm import KERNELS_ON_CPU
from esr_kernels.row_stats import LogitTransform

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
REDUCTIONS = ("sum", "mean", "none")
IMPLEMENTATIONS = ("auto", "torch", "triton", "reference")
# Class numbers travel through the row statistics as fp32, which counts exactly up to here.
_MOST_CLASSES = 1 << 24


@dataclass(frozen=True)
class Inputs:
    """Checked operands: one dtype per model, contiguous rows, weights in the logits' dtype."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    row_weight: Tensor | None
    student_transform: LogitTransform
    teacher_transform: LogitTransform
    classes: int


def check_inputs(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    token_weights: Tensor | None,
    temperature: float,
    teacher_temperature: float | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    num_classes: int | None,
    reduction: str,
    impl: str,
) -> Inputs:
    """Raise on the first argument that cannot be used, else return the operands ready for use."""
    _one_of("reduction", reduction, REDUCTIONS)
    _one_of("impl", impl, IMPLEMENTATIONS)
    student_hidden, student_weight = _model("student", student_hidden, student_weight, student_bias)
    teacher_hidden, teacher_weight = _model("teacher", teacher_hidden, teacher_weight, teacher_bias)
    device, tokens = student_hidden.device, student_hidden.shape[0]
    if teacher_hidden.shape[0] != tokens:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same number of tokens, got "
            f"{tokens} and {teacher_hidden.shape[0]}"
        )
    if teacher_hidden.device != device:
        raise ValueError(
            f"teacher_hidden must be on the student's device {device}, got {teacher_hidden.device}"
        )
    classes = _classes(num_classes, student_weight.shape[0], teacher_weight.shape[0])
    logits_dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise TypeError(
            "student and teacher must both be float64 or neither, got "
            f"{student_hidden.dtype} and {teacher_hidden.dtype}"
        )
    row_weight = None
    if token_weights is not None:
        if token_weights.shape != (tokens,):
            raise ValueError(
                f"token_weights must have shape [{tokens}], got {list(token_weights.shape)}"
            )
        if token_weights.is_complex() or token_weights.requires_grad:
            raise TypeError("token_weights must be real and carry no gradient; detach them")
        row_weight = token_weights.to(device=device, dtype=logits_dtype, non_blocking=True)
    if teacher_temperature is None:
        teacher_temperature = temperature
    if impl == "triton" and device.type == "cpu" and not _triton_runs_on_cpu():
        raise ValueError(
            "impl='triton' needs a GPU, got CPU tensors; use impl='auto' or 'torch', or set "
            "TRITON_INTERPRET=1 before importing Triton to run the kernels in its interpreter"
        )
    return Inputs(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        row_weight,
        _transform("student_", student_logit_scale, student_softcap, "temperature", temperature),
        _transform(
            "teacher_",
            teacher_logit_scale,
            teacher_softcap,
            "teacher_temperature",
            teacher_temperature,
        ),
        classes,
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def _model(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    for argument, value in ((f"{name}_hidden", hidden), (f"{name}_weight", weight)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a torch.Tensor, got {type(value).__name__}")
        if value.dim() != 2:
            raise ValueError(
                f"{argument} must have 2 dimensions, got shape {list(value.shape)}; "
                "flatten batch and time into one token dimension"
            )
        if value.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{argument} must be one of {allowed}, got {value.dtype}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}_weight must have {hidden.shape[1]} columns as {name}_hidden has, "
            f"got shape {list(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"{name}_weight must be on {name}_hidden's device {hidden.device}, got {weight.device}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.device != hidden.device):
        raise ValueError(
            f"{name}_bias must have shape [{weight.shape[0]}] on {hidden.device}, "
            f"got {list(bias.shape)} on {bias.device}"
        )
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name}_hidden and {name}_weight must have the same dtype outside of autocast, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    return hidden.contiguous(), weight.contiguous()


def _classes(num_classes: int | None, student: int, teacher: int) -> int:
    most = min(student, teacher)
    if most == 0:
        raise ValueError("student_weight and teacher_weight must have at least one row each")
    classes = most if num_classes is None else num_classes
    if not isinstance(classes, int) or not 0 < classes <= most:
        raise ValueError(
            f"num_classes must be an integer from 1 to {most}, the rows that student_weight "
            f"({student}) and teacher_weight ({teacher}) share, got {num_classes!r}"
        )
    if classes >= _MOST_CLASSES:
        raise ValueError(f"num_classes must be below {_MOST_CLASSES}, got {classes}")
    return classes


def _transform(
    prefix: str, scale: float, softcap: float | None, temperature_name: str, temperature: float
) -> LogitTransform:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{temperature_name} must be finite and above 0, got {temperature}")
    if not (math.isfinite(scale) and scale != 0):
        raise ValueError(f"{prefix}logit_scale must be finite and not 0, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"{prefix}softcap must be None or finite and above 0, got {softcap}")
    return LogitTransform(scale, softcap, temperature)


def _triton_runs_on_cpu() -> bool:
    """Whether kernels run without a GPU: in Triton's interpreter, or under a sanitizer that has
    taken the place of the launcher."""
    if importlib.util.find_spec("triton") is None:
        return False
    return os.environ.get("TRITON_INTERPRET") == "1" or KERNELS_ON_CPU
