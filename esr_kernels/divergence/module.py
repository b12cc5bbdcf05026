"""`linear_divergence` as a module, for code that composes losses as modules."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import Tensor, nn

from esr_kernels.divergence.arguments import Options, check_options, checked_transforms
from esr_kernels.divergence.losses import Divergence, resolve_divergence
from esr_kernels.divergence.op import LinearDivergence, linear_divergence

_TENSORS = {"student_bias", "teacher_bias", "student_ids", "teacher_ids"}
_TENSORS |= {"token_weights", "labels", "weight_grad"}
# Name -> default of the arguments that are not tensors.
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(linear_divergence).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _TENSORS
}
_TRANSFORMS = "temperature teacher_temperature student_softcap teacher_softcap "
_TRANSFORMS += "student_logit_scale teacher_logit_scale"


class LinearDivergenceLoss(nn.Module):
    """`linear_divergence` with fixed options.

    It has no parameters: both heads are arguments of `forward`, because a head may be tied to the
    model's embedding, or be gathered by an FSDP wrapper.

    Args:
        divergence: as in `linear_divergence`.
        options: its other keyword arguments except for tensors, which are passed to `forward`:
            temperature, teacher_temperature, student_softcap, teacher_softcap,
            student_logit_scale, teacher_logit_scale, num_classes, merge_student_ids,
            merge_teacher_ids, label_weight, reduction, plan, memory_budget, compact, group, impl.

    Raises:
        ValueError, TypeError: for an option that is unknown or that no call could use; `forward`
            raises what `linear_divergence` does.

    Example:
        >>> loss = LinearDivergenceLoss("forward_kl", temperature=2.0, reduction="mean")
        >>> loss(hidden, lm_head.weight, teacher_hidden, teacher_head.weight).loss.backward()
    """

    def __init__(self, divergence: Divergence | str = "reverse_kl", **options: Any) -> None:
        super().__init__()
        for name in options:
            if name not in _OPTIONS:
                where = "is a tensor: pass it to forward" if name in _TENSORS else "is unknown"
                raise TypeError(f"option {name!r} {where}; options are {', '.join(_OPTIONS)}")
        values = {**_OPTIONS, **options}
        fields = {field.name for field in dataclasses.fields(Options)} & set(values)
        check_options(Options(**{name: values[name] for name in fields}))
        checked_transforms(*(values[name] for name in _TRANSFORMS.split()))
        self.divergence, self.options = resolve_divergence(divergence), options

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        **tensors: Tensor | None,
    ) -> LinearDivergence:
        """`linear_divergence` of these tensors: token_weights, labels, student_bias, teacher_bias,
        student_ids, teacher_ids and weight_grad by keyword.

        Without `labels` the module's `label_weight` is not used.
        """
        options: dict[str, Any] = {**self.options, **tensors}
        if tensors.get("labels") is None:
            options["label_weight"] = 0.0
        models = student_hidden, student_weight, teacher_hidden, teacher_weight
        return linear_divergence(*models, self.divergence, **options)

    def extra_repr(self) -> str:
        """The divergence, and the options that are not at their defaults."""
        changed = {n: v for n, v in self.options.items() if n != "group" and v != _OPTIONS[n]}
        return ", ".join([str(self.divergence), *(f"{n}={v!r}" for n, v in changed.items())])
