"""`linear_divergence` of the tokens that a mask leaves, with operands as trainers hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_kernels.divergence.op import LinearDivergence, linear_divergence
from esr_kernels.integrations.causal_lm import inside_forward, last_hidden, output_head


def masked_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    valid: Tensor,
    *,
    student_weight: Tensor,
    teacher_weight: Tensor,
    **options: Any,
) -> LinearDivergence:
    """The sum over the rows of [T, D] where `valid` [T] bool; heads take the dtype of their states.

    Other rows are not computed. Counting the valid ones synchronises a GPU, as in the trainers that
    this serves, whose batches are half padding.
    """
    return linear_divergence(
        student_hidden,
        _plain(student_weight, student_hidden),
        teacher_hidden,
        _plain(teacher_weight, teacher_hidden),
        token_weights=valid.to(torch.float32),
        compact=True,
        **options,
    )


def _plain(weight: Tensor, hidden: Tensor) -> Tensor:
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError("DeepSpeed ZeRO-3 shards the output head, which is not supported here")
    # A sharded head that is trained is refused by the op: a gather out here would leave its
    # gradient unreduced.
    if hasattr(weight, "full_tensor") and not weight.requires_grad:
        weight = weight.full_tensor()
    return weight.to(hidden.dtype)


def trainer_loss(
    trainer: Any, model: Any, inputs: dict[str, Any], valid: Tensor, options: dict[str, Any]
) -> Tensor:
    """The sum over valid next tokens, for a Trainer with a `teacher_model`, as `model`'s forward.

    `model` is the student as its wrappers have it, `valid` is [B * (L - 1)] bool.
    """
    unwrap = trainer.accelerator.unwrap_model
    student, teacher = unwrap(model), unwrap(trainer.teacher_model.eval())

    def loss(**given: Any) -> Tensor:
        with trainer.accelerator.autocast():
            hidden = last_hidden(student, **given)
            with torch.no_grad():
                target = inside_forward(
                    trainer.teacher_model, teacher, lambda **x: last_hidden(teacher, **x), **given
                )
            return masked_divergence(
                hidden[:, :-1].flatten(0, 1),
                target[:, :-1].flatten(0, 1),
                valid,
                **output_head(student).arguments("student"),
                **output_head(teacher).arguments("teacher"),
                **options,
            ).loss

    summed: Tensor = inside_forward(model, student, loss, **inputs)
    return summed


def mean_loss(summed: Tensor, valid: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The sum divided by the items of the accumulated batch, or by its own valid tokens if None."""
    if num_items_in_batch is None:
        return summed / valid.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(summed.device)
    return summed / num_items_in_batch
