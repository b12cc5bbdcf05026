"""`linear_divergence` as a module, for code that composes losses as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from esr_kernels.divergence.arguments import Options, check_options, checked_transforms
from esr_kernels.divergence.losses import Divergence, resolve_divergence
from esr_kernels.divergence.op import LinearDivergence, linear_divergence
from esr_kernels.divergence.plan import Plan


class LinearDivergenceLoss(nn.Module):
    """`linear_divergence` with the options that do not change between steps kept.

    It has no parameters: both heads are arguments of `forward`, so that the head which a model ties
    to its embedding, or an FSDP wrapper gathers, stays where it is.

    Args:
        divergence: as in `linear_divergence`, and so are all options.

    Raises:
        ValueError or TypeError for an option that no call could use; `forward` raises what
        `linear_divergence` does.

    Example:
        >>> loss = LinearDivergenceLoss("forward_kl", temperature=2.0, reduction="mean")
        >>> loss(hidden, lm_head.weight, teacher_hidden, teacher_head.weight).loss.backward()
    """

    def __init__(
        self,
        divergence: Divergence | str = "reverse_kl",
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        num_classes: int | None = None,
        label_weight: float = 0.0,
        reduction: str = "sum",
        plan: str | Plan = "auto",
        memory_budget: int | None = None,
        compact: bool | None = None,
        group: Any = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_options(
            Options(
                num_classes=num_classes,
                label_weight=label_weight,
                reduction=reduction,
                plan=plan,
                memory_budget=memory_budget,
                compact=compact,
                group=group,
                impl=impl,
            )
        )
        checked_transforms(
            temperature,
            teacher_temperature,
            student_softcap,
            teacher_softcap,
            student_logit_scale,
            teacher_logit_scale,
        )
        self.divergence = resolve_divergence(divergence)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.student_logit_scale = student_logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        self.num_classes = num_classes
        self.label_weight = label_weight
        self.reduction = reduction
        self.plan = plan
        self.memory_budget = memory_budget
        self.compact = compact
        self.group = group
        self.impl = impl

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        token_weights: Tensor | None = None,
        labels: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        student_ids: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        weight_grad: Tensor | None = None,
    ) -> LinearDivergence:
        """What `linear_divergence` returns for these tensors and the module's options.

        Without `labels` the module's `label_weight` plays no part.
        """
        return linear_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            self.divergence,
            token_weights=token_weights,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            student_logit_scale=self.student_logit_scale,
            teacher_logit_scale=self.teacher_logit_scale,
            num_classes=self.num_classes,
            student_ids=student_ids,
            teacher_ids=teacher_ids,
            labels=labels,
            label_weight=self.label_weight if labels is not None else 0.0,
            weight_grad=weight_grad,
            reduction=self.reduction,
            plan=self.plan,
            memory_budget=self.memory_budget,
            compact=self.compact,
            group=self.group,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """The divergence, and the options that are not at their defaults."""
        parts = [str(self.divergence)]
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


_DEFAULTS = {
    name: value
    for name, value in (LinearDivergenceLoss.__init__.__kwdefaults__ or {}).items()
    if name != "group"
}
