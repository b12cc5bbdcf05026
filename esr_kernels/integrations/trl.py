"""TRL 1.16: its distillation trainers with `linear_divergence` under them.

`with patched(): ...` for TRL's own classes, or `DistillationTrainer`, a subclass with more options.
"""

from __future__ import annotations

from typing import Any

import trl

from esr_kernels.integrations import trl_sampling
from esr_kernels.integrations.trl_options import check_options, given_once, shared_classes
from esr_kernels.integrations.trl_patch import patched

__all__ = ["DistillationTrainer", "patched"]


class DistillationTrainer(trl.DistillationTrainer):  # type: ignore[misc]
    """`trl.DistillationTrainer` for pairs, losses and rollouts that TRL does not have.

    Vocabularies may be padded to different sizes: the loss is over `num_classes`, by default the
    smaller of the two, and no token beyond is sampled.

    Args:
        model, teacher_model, args and others by keyword: as in TRL.
        divergence: as in `linear_divergence`; None takes TRL's `args.beta`.
        merge_student_ids, merge_teacher_ids: as in `linear_divergence`: all ways to end an answer,
            as one class. Sampling stops at each of the student's.
        rollout: makes the engine that samples, at its first use: rollout(student, tokenizer,
            classes=, stop_ids=) returns an object with the `generate` of
            `esr_train.rollout.PrefixRollout`, and that class is such a maker (this package does
            not import it). It decodes in the weights' own dtype. None samples as TRL does.
        loss_options: further options of `patched`: plan, memory_budget, impl, num_classes,
            teacher_temperature.

    Raises:
        TypeError, ValueError: what cannot be combined, by name.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: Any,
        args: Any = None,
        *,
        divergence: Any = None,
        merge_student_ids: Any = None,
        merge_teacher_ids: Any = None,
        rollout: Any = None,
        loss_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.loss_options = given_once(
            loss_options,
            divergence=divergence,
            merge_student_ids=merge_student_ids,
            merge_teacher_ids=merge_teacher_ids,
        )
        check_options(self.loss_options)
        super().__init__(model, None, args, **others)  # it would refuse an unequal vocabulary
        self.teacher_model = self._prepared(teacher_model)
        pair: Any = (self.model, self.accelerator.unwrap_model(self.teacher_model))
        rows = tuple(model.config.get_text_config().vocab_size for model in pair)
        classes = shared_classes(self.loss_options, rows, self.accelerator.device)
        self.loss_options["num_classes"] = classes
        trl_sampling.stop_at(self, self.loss_options.get("merge_student_ids"))
        trl_sampling.sample_below(self, classes, rows[0])
        self.engine = None if rollout is None else trl_sampling.Engine(self, rollout, classes)

    def _prepared(self, teacher: Any) -> Any:
        from trl.models.utils import prepare_deepspeed
        from trl.trainer.utils import create_model_from_path

        args: Any = self.args
        if isinstance(teacher, str):
            options = dict(args.teacher_model_init_kwargs or {})
            options.setdefault("trust_remote_code", args.trust_remote_code)
            if args.teacher_model_revision is not None:
                options.setdefault("revision", args.teacher_model_revision)
            teacher = create_model_from_path(teacher, **options)
        elif not hasattr(teacher, "config") or args.teacher_model_init_kwargs is not None:
            raise ValueError(
                "teacher_model must be a model, or a name, which args.teacher_model_init_kwargs is "
                f"for; got {type(teacher).__name__}"
            )
        teacher.requires_grad_(False)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with patched(**self.loss_options):
            return super()._compute_loss(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.engine is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self.engine(self, prompt_ids)
