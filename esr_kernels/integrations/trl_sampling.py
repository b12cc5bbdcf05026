"""What samples for our subclass of TRL's trainer, and where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from esr_kernels.common.arguments import checked_ids


def stop_at(trainer: Any, merge_student_ids: Sequence[int] | Tensor | None) -> None:
    """Have all of a student's ends end a completion beside those that TRL has found."""
    ids = () if merge_student_ids is None else checked_ids("merge_student_ids", merge_student_ids)
    new = [token for token in ids if token not in trainer.eos_token_ids]
    if new and trainer.use_vllm:
        raise ValueError(
            "merge_student_ids: with use_vllm, name all ends in the model's generation_config "
            f"before it is loaded; vLLM does not stop at {new}"
        )
    trainer.eos_token_ids = [*trainer.eos_token_ids, *new]
    _generate_with(trainer, eos_token_id=trainer.eos_token_ids)


def sample_below(trainer: Any, classes: int, rows: int) -> None:
    """Sample no token from `classes` on, of the `rows` that the student's head has."""
    if classes >= rows:
        return
    if trainer.use_vllm:
        raise ValueError(
            f"use_vllm may sample the student's tokens {classes} to {rows - 1}, which the teacher "
            "does not have; use rollout= or TRL's own sampling"
        )
    suppressed = {*range(classes, rows), *(trainer.generation_config.suppress_tokens or [])}
    _generate_with(trainer, suppress_tokens=sorted(suppressed))


def _generate_with(trainer: Any, **settings: Any) -> None:
    trainer.generation_kwargs.update(settings)
    trainer.generation_config.update(**settings)


class Engine:
    """Samples a turn with an engine that is made at its first use, when the model is in place."""

    def __init__(self, trainer: Any, make: Callable[..., Any], classes: int) -> None:
        args = trainer.args
        if not callable(make):
            raise TypeError(
                "rollout must make an engine when it is called, as the class PrefixRollout does; "
                f"got {make!r}"
            )
        for name, clash in (
            ("args.use_vllm", trainer.use_vllm),
            ("args.repetition_penalty", trainer.repetition_penalty != 1.0),
            ("args.generation_kwargs", bool(args.generation_kwargs)),
            ("args.cache_implementation", args.cache_implementation is not None),
            ("an image processor", trainer._is_vlm),
            ("FSDP", trainer.is_fsdp_enabled),
            ("DeepSpeed", trainer.is_deepspeed_enabled),
        ):
            if clash:
                raise ValueError(f"rollout= cannot be combined with {name}")
        self.make, self.classes, self.turns = make, classes, 0
        self.engine: Any = None

    def __call__(self, trainer: Any, prompts: list[list[int]]) -> list[list[int]]:
        """One completion of each prompt, at least one token long, its end included."""
        if self.engine is None:
            self.engine = self.make(
                trainer.accelerator.unwrap_model(trainer.model),
                trainer._tokenizer,
                classes=self.classes,
                stop_ids=trainer.eos_token_ids,
            )
        self.turns += 1
        step, rank = trainer.state.global_step, trainer.accelerator.process_index
        batch = self.engine.generate(
            prompts,
            1,
            trainer.max_completion_length,
            trainer.temperature,
            (trainer.args.seed, rank, step, self.turns),
            top_k=trainer.top_k,
            top_p=trainer.top_p,
            min_p=trainer.min_p or 0.0,
        )
        return [batch.response(row) for row in range(len(prompts))]
