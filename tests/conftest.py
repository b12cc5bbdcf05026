"""Fixtures for whole runs on tiny random models."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from esr_train.config import Config, with_overrides
from tests.tiny import save_pair

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of a student and a teacher, of different widths and padded vocabularies."""
    root = tmp_path_factory.mktemp("models")
    student = save_pair(root / "student", seed=0)
    teacher = save_pair(root / "teacher", seed=1, hidden_size=48, vocab_size=40)
    return student, teacher


@pytest.fixture(scope="session")
def make_config(pair: tuple[str, str]) -> Callable[..., Config]:
    """A configuration that runs in a moment; keyword arguments are sections or keys."""
    base = Config.model_validate(
        {
            "student": {"model": pair[0]},
            "teacher": {"model": pair[1]},
            "data": {"chat": False},
            "rollout": {"prompts": 4, "samples": 2, "max_new_tokens": 6},
            "optim": {"lr": 0.003, "warmup_steps": 2},
            "eval": {"every": 2, "problems": 5, "max_new_tokens": 8, "teacher_text": 6},
            "steps": 3,
        }
    )
    return lambda **changes: with_overrides(
        base, {key.replace("__", "."): value for key, value in changes.items()}
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
