"""Tasks: the source of prompts and the scores of answers.

A task has `Problem`s in two disjoint splits and, if answers can be checked, scores responses.

    task = load_task("sums")
    problems = task.problems("heldout", count=64, seed=0)
    task.score(problems[0], "the answer is 147.")   # 1.0 or 0.0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

SPLITS = ("train", "heldout")
BUILTIN_MODELS = {"sums-teacher": "sums/teacher", "sums-student": "sums/student"}


@dataclass(frozen=True)
class Problem:
    """One prompt and, where the task can check it, the answer that `Task.score` compares with."""

    prompt: str
    answer: str | None = None


class Task(Protocol):
    """The interface that training and evaluation use."""

    name: str
    chat: bool  # whether prompts are formatted by the tokenizer's chat template

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` problems of "train" or "heldout"; the same arguments give the same list."""
        ...

    def score(self, problem: Problem, response: str) -> float | None:
        """1.0 or 0.0, or None where the task has no checkable answer."""
        ...


def check_request(split: str, count: int) -> None:
    """Raise ValueError unless `split` is one of SPLITS and `count` is at least 1."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, allowed are {', '.join(map(repr, SPLITS))}")
    if count < 1:
        raise ValueError(f"count: got {count}, must be at least 1")


def load_task(name: str) -> Task:
    """The task called `name`: "sums", "prompts", or "prompts:PATH" for a text file of prompts.

    Raises:
        ValueError: for an unknown name, or for a prompt file that is missing, unreadable or empty.
    """
    # Imported here because both modules take Problem from this one.
    from esr_train.tasks.prompts import PromptsTask
    from esr_train.tasks.sums import SumsTask

    if name == "sums":
        return SumsTask()
    if name == "prompts":
        return PromptsTask()
    if name.startswith("prompts:"):
        return PromptsTask(Path(name.removeprefix("prompts:")))
    raise ValueError(f"task: got {name!r}, allowed are 'sums', 'prompts' and 'prompts:PATH.txt'")


def builtin_model_path(name: str) -> Path:
    """Directory, in Hugging Face format, of a model that ships with this package.

    Raises:
        ValueError: for a name other than those in BUILTIN_MODELS.
    """
    if name not in BUILTIN_MODELS:
        allowed = ", ".join(map(repr, BUILTIN_MODELS))
        raise ValueError(f"built-in model: got {name!r}, allowed are {allowed}")
    return Path(__file__).parent / BUILTIN_MODELS[name]
