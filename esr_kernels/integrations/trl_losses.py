"""What TRL's two losses are replaced by (`trl_patch.patched`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from esr_kernels.integrations.peers import divergence_of
from esr_kernels.integrations.rows import masked_divergence, mean_loss, trainer_loss


def chunked_divergence_loss(
    signature: inspect.Signature, options: dict[str, Any]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_chunked_divergence_loss`: the mean loss, the sum of entropies, the number of tokens."""

    def loss(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        x = SimpleNamespace(**given.arguments)
        valid = x.completion_mask.reshape(-1) != 0
        out = masked_divergence(
            x.student_hidden_states.flatten(0, -2),
            x.teacher_hidden_states.flatten(0, -2),
            valid,
            student_weight=x.student_lm_head_weight,
            teacher_weight=x.teacher_lm_head_weight,
            student_bias=x.student_lm_head_bias,
            teacher_bias=x.teacher_lm_head_bias,
            student_logit_scale=x.student_logit_scale,
            teacher_logit_scale=x.teacher_logit_scale,
            student_softcap=x.student_final_logit_softcapping,
            teacher_softcap=x.teacher_final_logit_softcapping,
            temperature=x.temperature,
            **{"divergence": divergence_of(x.beta), **options},
        )
        mean = mean_loss(out.loss, valid, x.num_items_in_batch)
        return mean, out.student_entropy.sum(), valid.sum()

    loss.__signature__ = signature  # type: ignore[attr-defined]
    return loss


def gkd_loss(by_trl: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`GKDTrainer.compute_loss`, whose loss has temperature 1 whatever it samples with."""

    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs:
            return by_trl(self, model, inputs, return_outputs, num_items_in_batch)
        valid = (inputs["labels"][:, 1:] != -100).reshape(-1)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        options_now = {"divergence": divergence_of(self.beta), **options}
        summed = trainer_loss(self, model, given, valid, options_now)
        return mean_loss(summed, valid, num_items_in_batch)

    return compute_loss
