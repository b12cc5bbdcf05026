"""transformers' `Trainer` with `linear_divergence` as its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_kernels.divergence.losses import Divergence, resolve_divergence
from esr_kernels.integrations.rows import mean_loss, trainer_loss


class Distillation:
    """A mixin: the divergence from a teacher, over the tokens that `labels` select.

    Batches have `input_ids`, `attention_mask` and `labels` as causal language models take them; a
    token counts where its label is not -100. The texts are those of the data set: this samples
    nothing. The mean is over the tokens of an accumulated batch, on all processes: 1 batch of 4
    and 4 accumulated batches of 1 give the same gradient. The student may be wrapped by PEFT and
    DDP; gradient and memory are those of `linear_divergence`, with no logits of all tokens.

    Args:
        teacher_model: a causal language model; it gets no gradient.
        divergence: as in `linear_divergence`.
        loss_options: its other keyword arguments, such as temperature, num_classes, plan,
            memory_budget, merge_student_ids, and label_weight for a cross-entropy beside.

    Raises:
        ImportError: the Trainer is not one that asks whether a loss is scaled, as of
            transformers 5.23.
        ValueError: nn.DataParallel, batches without labels, or a model whose head is not known
            by its weight and bias.

    Example:
        >>> class DistillationTrainer(Distillation, transformers.Trainer): ...
        >>> DistillationTrainer(model, args, train_dataset=data, teacher_model=teacher).train()
    """

    def __init__(
        self,
        *args: Any,
        teacher_model: Any,
        divergence: Divergence | str = "reverse_kl",
        loss_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if not hasattr(type(self), "loss_is_scaled_for_ga"):
            raise ImportError("transformers must have Trainer.loss_is_scaled_for_ga, as 5.23 has")
        self.divergence, self.loss_options = resolve_divergence(divergence), loss_options or {}
        super().__init__(*args, **others)
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise ValueError("nn.DataParallel is not supported: use torchrun or accelerate launch")
        teacher_model.requires_grad_(False)
        self.teacher_model = trainer.accelerator.prepare_model(teacher_model, evaluation_mode=True)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss; with `return_outputs` the model's outputs, logits included, beside it."""
        trainer: Any = self
        if inputs.get("labels") is None:
            raise ValueError(f"inputs must have labels, got {sorted(inputs)}")
        labels = inputs["labels"][:, 1:].flatten()
        given = {name: value for name, value in inputs.items() if name != "labels"}
        options = {"divergence": self.divergence, **self.loss_options}
        if options.get("label_weight"):
            options["labels"] = labels
        summed = trainer_loss(self, model, given, labels != -100, options)
        loss = mean_loss(summed, labels != -100, num_items_in_batch)
        # Else the Trainer divides by the number of accumulated batches.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
            loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**given)

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> Any:
        """Evaluation by the loss alone computes no logits."""
        trainer: Any = self
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, False, ignore_keys)  # type: ignore[misc]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = self.compute_loss(model, trainer._prepare_inputs(inputs))
        return loss.detach(), None, None
