"""Problems from a file (JSON lines, JSON, Parquet) or a dataset of the Hugging Face hub.

    data: {task: questions.jsonl, prompt: question, answer: answer, grader: exact}
    data: {task: openai/gsm8k, subset: main, heldout: test, prompt: question, answer: answer,
           grader: math}

A column of prompts holds text, or chat messages: a list of {role, content}. Without `data.heldout`
every 10th distinct prompt is held out. A training problem whose prompt is held out too is left out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esr_train.config import ConfigError, DataConfig
from esr_train.grading import load_grader
from esr_train.tasks import Message, Problem, Prompt, check_request

_HELDOUT_EVERY = 10
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def is_dataset(name: str) -> bool:
    """Whether a task name is a file or a hub dataset, such as "a.jsonl" or "openai/gsm8k"."""
    return ":" not in name and (Path(name).suffix in _READERS or "/" in name)


class DatasetTask:
    """The problems of `config.task`, graded by `config.grader`.

    Raises:
        ConfigError: naming the key of `data` that cannot be used.
    """

    def __init__(self, config: DataConfig) -> None:
        self.name, self._config = config.task, config
        if (config.answer is None) != (config.grader is None):
            given, missing = ("answer", "grader") if config.answer else ("grader", "answer")
            raise ConfigError(f"data.{missing}: got None, must be given where data.{given} is")
        self._grade = load_grader(config.grader, config.allow_code) if config.grader else None
        train = self._read("task", config.task, config.split)
        if config.heldout is None:
            heldout = train[_HELDOUT_EVERY - 1 :: _HELDOUT_EVERY]
        elif Path(config.heldout).suffix in _READERS:
            heldout = self._read("heldout", config.heldout, "train")
        elif Path(config.task).suffix in _READERS:
            raise ConfigError(
                f"data.heldout: got {config.heldout!r}, must be a .jsonl, .json or .parquet file, "
                "or null, where data.task is a file"
            )
        else:
            heldout = self._read("heldout", config.task, config.heldout)
        if not heldout:
            raise ConfigError(
                f"data.heldout: got None, but {config.task!r} has {len(train)} distinct prompts, "
                f"and every {_HELDOUT_EVERY}th would be held out; give a file or a split"
            )
        held = {problem.prompt for problem in heldout}
        train = [problem for problem in train if problem.prompt not in held]
        if not train:
            raise ConfigError(f"data.task: every prompt of {config.task!r} is held out")
        self._splits = {"train": train, "heldout": heldout}

    def count(self, split: str) -> int:
        """Distinct problems of a split."""
        return len(self._splits[split])

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` different problems of `split`: of "train" shuffled by seed, of "heldout" the
        first ones of the file."""
        check_request(split, count)
        found = self._splits[split]
        if count > len(found):
            raise ValueError(
                f"count: got {count}, but {self.name!r} has {len(found)} different {split} problems"
            )
        if split == "train":
            found = random.Random(f"train:{seed}").sample(found, len(found))
        return found[:count]

    def score(self, problem: Problem, response: str) -> dict[str, float] | None:
        """The grader's scores."""
        if self._grade is None or problem.answer is None:
            return None
        return self._grade(response, problem.answer)

    def _read(self, key: str, source: str, split: str) -> list[Problem]:
        """The distinct problems of a file or of a split of a hub dataset, in their order."""
        rows, config = _rows(key, source, config_subset(self._config), split), self._config
        columns = {"prompt": config.prompt}
        columns |= {"answer": config.answer} if config.answer else {}
        columns |= {"teacher_prompt": config.teacher_prompt} if config.teacher_prompt else {}
        for name, column in columns.items():
            if column not in rows.column_names:
                raise ConfigError(
                    f"data.{name}: got {column!r}, but {source!r} has the columns "
                    + ", ".join(map(repr, rows.column_names))
                )
        found: dict[Prompt, Problem] = {}
        rows = _decoded(rows.select_columns(list(columns.values())), f"data.{key}: {source!r}")
        for number, row in enumerate(rows, start=1):
            where = f"row {number} of {source!r}"
            prompt = self._prompt(row[config.prompt], f"data.prompt: {where}")
            own = None
            if config.teacher_prompt:
                own = self._prompt(row[config.teacher_prompt], f"data.teacher_prompt: {where}")
            answer = None
            if config.answer:
                answer = row[config.answer]
                if answer is None:
                    raise ConfigError(f"data.answer: {where} has no {config.answer!r}")
                answer = answer if isinstance(answer, str) else _plain(answer)
            found.setdefault(prompt, Problem(prompt, answer, own))
        return list(found.values())

    def _prompt(self, value: Any, where: str) -> Prompt:
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value:
            return tuple(_message(message, where) for message in value)
        raise ConfigError(
            f"{where}: got {value!r}, must be text or a list of messages with role and content"
        )


def config_subset(config: DataConfig) -> str | None:
    """The subset of a hub dataset; files have none."""
    if config.subset is not None and Path(config.task).suffix in _READERS:
        raise ConfigError(f"data.subset: got {config.subset!r}, must be null for a file")
    return config.subset


def _message(message: Any, where: str) -> Message:
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        others = {key for key, value in message.items() if value is not None}
        if isinstance(role, str) and isinstance(content, str) and others == {"role", "content"}:
            return role, content
    raise ConfigError(
        f"{where}: got the message {message!r}, must be a role and a content, both text"
    )


def _decoded(rows: Any, where: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except UnicodeDecodeError as error:  # files are read as bytes
        raise ConfigError(f"{where} is not UTF-8 text ({error})") from error


def _plain(answer: Any) -> str:
    """Numbers, lists and mappings as the text that a grader reads: JSON."""
    return json.dumps(answer, ensure_ascii=False)


def _rows(key: str, source: str, subset: str | None, split: str) -> Any:
    """A `datasets.Dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.{key}: {source!r} is read with the package datasets: pip install datasets"
        ) from error
    datasets.disable_progress_bars()
    reader = _READERS.get(Path(source).suffix)
    path = Path(source).expanduser()
    if reader and not path.is_file():
        raise ConfigError(f"data.{key}: {source!r} is not a file")
    if reader and not path.stat().st_size:
        raise ConfigError(f"data.{key}: {source!r} has no rows")
    try:
        if reader:
            rows = datasets.load_dataset(reader, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, subset, split=split)
    except Exception as error:  # datasets raises many classes, arrow's among them
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ConfigError(
            f"data.{key}: {source!r} could not be read ({type(error).__name__}: {reason})"
        ) from error
    if not len(rows):
        raise ConfigError(f"data.{key}: {source!r} has no rows")
    return rows
