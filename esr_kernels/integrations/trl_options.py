"""The options of `linear_divergence` under TRL, checked before anything is trained."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from esr_kernels.divergence.arguments import Options, checked_transforms
from esr_kernels.divergence.arguments import check_options as check_values
from esr_kernels.divergence.losses import resolve_divergence
from esr_kernels.divergence.op import linear_divergence
from esr_kernels.divergence.plan import Plan

# Those that TRL does not set.
_OPTIONS = (
    "divergence num_classes merge_student_ids merge_teacher_ids teacher_temperature "
    "plan memory_budget impl"
).split()


def check_options(options: dict[str, Any]) -> None:
    """Raise on an option that is not the user's to give, or on a value that no model allows."""
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"option {name!r} is unknown; options are {', '.join(_OPTIONS)}")
    rest = dict(options)
    resolve_divergence(rest.pop("divergence", "reverse_kl"))
    checked_transforms(1.0, rest.pop("teacher_temperature", None), None, None, 1.0, 1.0)
    check_values(Options(**rest))


def given_once(loss_options: dict[str, Any] | None, **arguments: Any) -> dict[str, Any]:
    """The options of both, without those that are None; raises on one that both have."""
    if loss_options is not None and not isinstance(loss_options, dict):
        raise TypeError(f"loss_options must be a dict, got {type(loss_options).__name__}")
    first, second = (
        {name: value for name, value in options.items() if value is not None}
        for options in (arguments, loss_options or {})
    )
    for name in first:
        if name in second:
            raise TypeError(
                f"{name} is given twice, as an argument and in loss_options: "
                f"{first[name]!r} and {second[name]!r}"
            )
    return {**first, **second}


def shared_classes(options: dict[str, Any], rows: tuple[int, int], device: torch.device) -> int:
    """The classes of heads of so many rows, of the student and the teacher.

    Raises what every step would raise: the loss of no token, with heads of these sizes.
    """
    if "num_classes" not in options and 10 * min(rows) < 9 * max(rows):
        what = f"vocabularies of {rows[0]} and {rows[1]} tokens: is num_classes really"
        warnings.warn(f"{what} {min(rows)}? Say so in loss_options", stacklevel=3)
    classes: int = options.get("num_classes", min(rows))
    # A Plan is for heads of the models' width.
    usable = {name: value for name, value in options.items() if not isinstance(value, Plan)}
    x, student, teacher = (torch.zeros(count, 1, device=device) for count in (0, *rows))
    linear_divergence(x, student, x, teacher, **{**usable, "num_classes": classes})
    return classes
