"""Prompts as token ids, and which of them a step trains on.

The order is a function of the seed and the step alone. Runs with the same seed see the same prompts
at the same step, even if they differ otherwise, and a resumed run needs no data position.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from esr_train.config import ConfigError, DataConfig
from esr_train.tasks import Problem, Prompt, Task

POOL = 8192  # problems of an epoch where a task makes them up without end


def seed_from(*parts: int | str) -> int:
    """A 63-bit seed derived from `parts`, such as (seed, "rollout", step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class PromptEncoder:
    """Prompts as the token ids of one tokenizer; each is encoded once.

    Messages go through the chat template, up to where the answer starts. Text does so as a message
    of the user where `data.chat` says so or the tokenizer has a template, else it is encoded as it
    is.

    Raises:
        ConfigError: `data` asks for a chat template, and the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self._has_template = bool(getattr(tokenizer, "chat_template", None))
        self._chat = self._has_template if config.chat is None else config.chat
        if self._chat and not self._has_template:
            raise ConfigError("data.chat: got True, but the tokenizer has no chat template")
        if config.system is not None and not self._chat:
            raise ConfigError(
                f"data.system: got {config.system!r}, must be null where prompts do not go through "
                "a chat template"
            )
        self._ids: dict[Prompt, list[int]] = {}

    def __call__(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        if prompt not in self._ids:
            self._ids[prompt] = self._encode(prompt)
        return self._ids[prompt]

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not self._chat:
                return list(self.tokenizer(prompt)["input_ids"])
            prompt = (("user", prompt),)
        if not self._chat:
            reason = "data.chat is false" if self._has_template else "the tokenizer has none"
            raise ConfigError(
                f"data.task: its prompts are chat messages, and need a chat template, but {reason}"
            )
        if self.config.system is not None:
            if prompt[0][0] == "system":
                raise ConfigError(
                    "data.system: must be null, a prompt has a system message of its own: "
                    f"{prompt[0][1]!r}"
                )
            prompt = (("system", self.config.system), *prompt)
        # Rendered to text first: the template writes its own special tokens, so none are added.
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in prompt],
            tokenize=False,
            add_generation_prompt=True,
            **self.config.chat_template_kwargs,
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class TokenizedTask:
    """A task, and its prompts in the tokens of student and teacher.

    `same_tokens`: the teacher reads the student's tokens.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        config: DataConfig,
        teacher_tokenizer: Any = None,
        same_tokens: bool = True,
    ) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.encode = PromptEncoder(tokenizer, config)
        self._for_teacher = None
        if config.teacher_prompt is not None or not same_tokens:
            self._for_teacher = PromptEncoder(teacher_tokenizer, config)

    def ids(self, problem: Problem) -> list[int]:
        """Token ids of a prompt."""
        return self.encode(problem.prompt)

    def teacher_ids(self, problem: Problem) -> list[int] | None:
        """Token ids of the teacher's own prompt, or of the same one in its own tokens, by its own
        chat template; None where it reads the student's."""
        if self._for_teacher is None:
            return None
        own = problem.teacher_prompt
        return self._for_teacher(problem.prompt if own is None else own)


class PromptStream:
    """The training prompts of every step; of `pool` different ones, or None for the task's all."""

    def __init__(
        self, tokenized: TokenizedTask, per_step: int, seed: int, pool: int | None = None
    ) -> None:
        count = tokenized.task.count("train") or POOL
        self.problems = tokenized.task.problems("train", min(count, pool or count), seed)
        self.tokenized, self.per_step, self.seed = tokenized, per_step, seed
        self._epoch, self._order = -1, [0]

    def problem_numbers(self, step: int) -> list[int]:
        """`per_step` places in `problems` for step 1, 2, ...; every epoch is shuffled afresh."""
        size, first = len(self.problems), (step - 1) * self.per_step
        chosen = []
        for position in range(first, first + self.per_step):
            epoch, index = divmod(position, size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(seed_from(self.seed, "epoch", epoch))
                self._epoch, self._order = epoch, torch.randperm(size, generator=generator).tolist()
            chosen.append(self._order[index])
        return chosen

    def problems_for(self, step: int) -> list[Problem]:
        """The problems of a step."""
        return [self.problems[number] for number in self.problem_numbers(step)]

    def prompts_for(self, step: int) -> list[list[int]]:
        """Token ids of the prompts of a step."""
        return [self.tokenized.ids(problem) for problem in self.problems_for(step)]

    def teacher_prompts_for(self, step: int) -> list[list[int]] | None:
        """Token ids of the prompts that the teacher sees at a step; None where they are the
        student's."""
        prompts = [self.tokenized.teacher_ids(problem) for problem in self.problems_for(step)]
        return None if None in prompts else [prompt for prompt in prompts if prompt]

    @property
    def digest(self) -> str:
        """A hash of the problems and their order: a resumed run must have the same."""
        return hashlib.sha256(repr(self.problems).encode()).hexdigest()
