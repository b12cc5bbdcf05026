"""What all commands share: the loaded and checked pair of models, and the run directory."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from esr_kernels.divergence.losses import resolve_divergence
from esr_train.config import Config, ConfigError, to_yaml
from esr_train.evaluate import Evaluator
from esr_train.metrics import cpu_name
from esr_train.models import head, load_model, load_tokenizer
from esr_train.tasks import Task, load_task
from esr_train.teacher import Teacher, check_same_tokenizer

_PACKAGES = "torch triton transformers tokenizers safetensors flash-attn liger-kernel".split()
# Settings that may differ between a run and its continuation.
_MAY_CHANGE = {"steps", "eval", "checkpoint", "report", "arms", "seeds"}


@dataclass(frozen=True)
class Experiment:
    """A student and a teacher that fit together, and the task they meet on."""

    student: Any
    teacher: Teacher
    tokenizer: Any  # the student's; every text is made with it
    teacher_tokenizer: Any
    task: Task
    evaluator: Evaluator | None  # None: the config asks for no evaluation


def load_experiment(config: Config) -> Experiment:
    """Load all that a run needs.

    Raises:
        ConfigError, ModelError, FetchError, ContextError: whatever of it cannot be used.
    """
    try:
        resolve_divergence(config.loss.divergence)
    except ValueError as error:
        raise ConfigError(f"loss.divergence: {error}") from error
    try:
        task = load_task(config.rollout.task)
    except ValueError as error:
        raise ConfigError(f"rollout.task: {error}") from error
    tokenizer = load_tokenizer(config.student, config.runtime)
    teacher_tokenizer = load_tokenizer(config.teacher, config.runtime)
    student = load_model(config.student, config.runtime)
    teacher = Teacher(load_model(config.teacher, config.runtime))
    classes = min(head(student).weight.shape[0], teacher.head.weight.shape[0])
    check_same_tokenizer(tokenizer, teacher_tokenizer, classes)
    evaluator = Evaluator(config, teacher, tokenizer, task) if config.eval.every else None
    return Experiment(student, teacher, tokenizer, teacher_tokenizer, task, evaluator)


def write_run_files(directory: Path, config: Config) -> None:
    """config.yaml and environment.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (directory / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def check_continues(directory: Path, config: Config) -> None:
    """Raise ConfigError where `directory` holds a run that was made with other settings."""
    path = directory / "config.yaml"
    if not path.is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise ConfigError(f"--out: {directory} is not empty and holds no earlier run")
        return
    before, now = yaml.safe_load(path.read_text()), yaml.safe_load(to_yaml(config))
    for key, value in now.items():
        if key not in _MAY_CHANGE and before.get(key) != value:
            raise ConfigError(
                f"{directory} holds a run with another configuration: {key} was "
                f"{before.get(key)}, is {value}; choose another --out"
            )


def environment() -> dict[str, Any]:
    """Versions, hardware and date: what the numbers of a run depend on besides its config."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "git_commit": _git_commit(),
    }


def progress_text(row: dict[str, Any], metrics: dict[str, float], metric: str) -> str:
    """One line on a step: what it learned, what it cost, the latest evaluation."""
    seconds = row["seconds"]
    parts = [f"{row['divergence']:.3f} nats/token"]
    if metric in metrics:
        parts.append(f"{metric} {metrics[metric]:.3f}")
    parts.append("/".join(f"{seconds.get(p, 0.0):.2f}" for p in ("rollout", "teacher", "student")))
    peaks = [peak for peak in row["peak_bytes"].values() if peak is not None]
    if peaks:
        parts.append(f"{max(peaks) / 2**30:.2f} GiB")
    return ", ".join(parts)


def progress_bar(total: int) -> Any:
    """A bar over training steps, on stderr."""
    return tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.05)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with a + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "."], capture_output=True, text=True
        )
    except OSError:  # git is not installed
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
