"""Prompts: which ones a step trains on, as token ids.

The order is a function of the seed and the step alone. Runs with the same seed see the same prompts
at the same step whatever else differs between them, and a resumed run needs no data position.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from esr_train.config import ConfigError
from esr_train.tasks import Problem, Task

POOL = 8192  # training problems asked of a task; an epoch goes through them once


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed from what it is for, such as (seed, "rollout", step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class PromptStream:
    """The training prompts of every step."""

    def __init__(self, task: Task, tokenizer: Any, per_step: int, seed: int) -> None:
        # A task with a finite set of prompts repeats them; an epoch should not.
        self.problems = list(dict.fromkeys(task.problems("train", POOL, seed)))
        self.chat, self.tokenizer, self.per_step, self.seed = task.chat, tokenizer, per_step, seed

    def problems_for(self, step: int) -> list[Problem]:
        """`per_step` problems for step 1, 2, ...; every epoch is shuffled afresh."""
        size, first = len(self.problems), (step - 1) * self.per_step
        picked = []
        for position in range(first, first + self.per_step):
            epoch, index = divmod(position, size)
            picked.append(self.problems[self._order(epoch)[index]])
        return picked

    def prompts_for(self, step: int) -> list[list[int]]:
        """Token ids of the prompts of a step."""
        return [encode(self.tokenizer, p, self.chat) for p in self.problems_for(step)]

    def _order(self, epoch: int) -> list[int]:
        cached: tuple[int, list[int]] | None = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != epoch:
            generator = torch.Generator().manual_seed(seed_from(self.seed, "epoch", epoch))
            cached = (epoch, torch.randperm(len(self.problems), generator=generator).tolist())
            self._cached_order = cached
        return cached[1]


def encode(tokenizer: Any, problem: Problem, chat: bool) -> list[int]:
    """A prompt as token ids: through the chat template, up to where the answer starts, or as is."""
    if not chat:
        return list(tokenizer(problem.prompt)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "rollout.task: its prompts are chat messages, but the tokenizer has no chat template"
        )
    # Rendered to text first: the template writes its own special tokens, so none are added again.
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
