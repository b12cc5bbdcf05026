"""Prompts as token ids, and which of them a step trains on.

The order is a function of the seed and the step alone. Runs with the same seed see the same prompts
at the same step, even if they differ otherwise, and a resumed run needs no data position.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from esr_train.config import ConfigError
from esr_train.tasks import Problem, Task

POOL = 8192  # training problems requested from a task; an epoch has each of them once


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed derived from `parts`, such as (seed, "rollout", step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class TokenizedTask:
    """A task and a tokenizer; each problem is encoded once.

    A prompt is formatted by the chat template, up to the start of the answer, or encoded unchanged.
    """

    def __init__(self, task: Task, tokenizer: Any) -> None:
        if task.chat and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "rollout.task: its prompts are chat messages, but the tokenizer has no chat "
                "template"
            )
        self.task, self.tokenizer = task, tokenizer
        self._ids: dict[Problem, list[int]] = {}

    def ids(self, problem: Problem) -> list[int]:
        """Token ids of a prompt."""
        if problem not in self._ids:
            self._ids[problem] = self._encode(problem)
        return self._ids[problem]

    def _encode(self, problem: Problem) -> list[int]:
        if not self.task.chat:
            return list(self.tokenizer(problem.prompt)["input_ids"])
        # Rendered to text first: the template writes its own special tokens, so none are added.
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class PromptStream:
    """The training prompts of every step."""

    def __init__(self, tokenized: TokenizedTask, per_step: int, seed: int) -> None:
        # A task with few prompts repeats them to fill the pool; an epoch has each of them once.
        self.problems = list(dict.fromkeys(tokenized.task.problems("train", POOL, seed)))
        self.tokenized, self.per_step, self.seed = tokenized, per_step, seed
        self._epoch, self._order = -1, [0]

    def problems_for(self, step: int) -> list[Problem]:
        """`per_step` problems for step 1, 2, ...; every epoch is shuffled afresh."""
        size, first = len(self.problems), (step - 1) * self.per_step
        chosen = []
        for position in range(first, first + self.per_step):
            epoch, index = divmod(position, size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(seed_from(self.seed, "epoch", epoch))
                self._epoch, self._order = epoch, torch.randperm(size, generator=generator).tolist()
            chosen.append(self.problems[self._order[index]])
        return chosen

    def prompts_for(self, step: int) -> list[list[int]]:
        """Token ids of the prompts of a step."""
        return [self.tokenized.ids(problem) for problem in self.problems_for(step)]
