"""Tasks: the source of prompts and the scores of answers.

A task has `Problem`s in two disjoint splits and, if answers can be checked, scores responses.

    task = load_task(DataConfig(task="sums"))
    problems = task.problems("heldout", count=64, seed=0)
    task.score(problems[0], "the answer is 147.")   # {"accuracy": 1.0}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esr_train.config import ConfigError, DataConfig
from esr_train.import_path import imported

SPLITS = ("train", "heldout")
BUILTIN_MODELS = {"sums-teacher": "sums/teacher", "sums-student": "sums/student"}


# A chat message: (role, content).
Message = tuple[str, str]
# A prompt: text that is encoded as it is, or chat messages that go through the chat template.
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Problem:
    """One prompt and, where the task can check it, the answer that `Task.score` compares with."""

    prompt: Prompt
    answer: str | None = None
    teacher_prompt: Prompt | None = None  # what the teacher sees instead; None: the same


class Task(Protocol):
    """The interface that training and evaluation use."""

    name: str

    def count(self, split: str) -> int | None:
        """How many different problems a split has; None where they are made up without end."""
        ...

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` problems of "train" or "heldout"; the same arguments give the same list.

        Raises:
            ValueError: `count` is above what the split has.
        """
        ...

    def score(self, problem: Problem, response: str) -> dict[str, float] | None:
        """Scores from 0 to 1, "accuracy" the first; None where there is no checkable answer."""
        ...


def check_request(split: str, count: int) -> None:
    """Raise ValueError unless `split` is one of SPLITS and `count` is at least 1."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, allowed are {', '.join(map(repr, SPLITS))}")
    if count < 1:
        raise ValueError(f"count: got {count}, must be at least 1")


def load_task(config: DataConfig) -> Task:
    """The task that `config.task` names.

    Raises:
        ConfigError: for an unknown name, a file or dataset that cannot be read, or keys of `data`
            that the task does not take.
    """
    # Imported here because these modules take Problem from this one.
    from esr_train.tasks.dataset import DatasetTask, is_dataset
    from esr_train.tasks.gym import GymTask
    from esr_train.tasks.prompts import PromptsTask
    from esr_train.tasks.sums import SumsTask

    name = config.task
    if is_dataset(name):
        return DatasetTask(config)
    if name not in ("sums", "prompts") and ":" not in name:
        raise ConfigError(
            f"data.task: got {name!r}, allowed are 'sums', 'prompts', 'prompts:PATH.txt', "
            "'reasoning_gym:NAME', a .jsonl, .json or .parquet file, a dataset of the Hugging Face "
            "hub such as 'openai/gsm8k', and the import path of a task of yours, "
            "'package.module:name'"
        )
    _check_no_columns(config)
    try:
        if name == "sums":
            return SumsTask()
        if name == "prompts":
            return PromptsTask()
        if name.startswith("prompts:"):
            return PromptsTask(Path(name.removeprefix("prompts:")))
        if name.startswith("reasoning_gym:"):
            return GymTask(name.removeprefix("reasoning_gym:"))
        return _own_task(name)
    except ValueError as error:
        raise ConfigError(f"data.task: {error}") from error


def _own_task(path: str) -> Task:
    """What the class or function at an import path returns when it is called without arguments."""
    task: Task = imported("data.task", path)()
    lacking = [name for name in ("name", "count", "problems", "score") if not hasattr(task, name)]
    if lacking:
        raise ConfigError(
            f"data.task: {path!r} makes a {type(task).__name__} without {', '.join(lacking)}, "
            "which esr_train.tasks.Task has"
        )
    return task


def _check_no_columns(config: DataConfig) -> None:
    """Raise ConfigError for a key that only files and hub datasets take."""
    for key in ("subset", "heldout", "answer", "teacher_prompt", "grader"):
        value = getattr(config, key)
        if value is not None:
            raise ConfigError(
                f"data.{key}: got {value!r}, but data.task {config.task!r} has problems, answers "
                "and a grader of its own; it must be null"
            )


def builtin_model_path(name: str) -> Path:
    """Directory, in Hugging Face format, of a model that ships with this package.

    Raises:
        ValueError: for a name other than those in BUILTIN_MODELS.
    """
    if name not in BUILTIN_MODELS:
        allowed = ", ".join(map(repr, BUILTIN_MODELS))
        raise ValueError(f"built-in model: got {name!r}, allowed are {allowed}")
    return Path(__file__).parent / BUILTIN_MODELS[name]
