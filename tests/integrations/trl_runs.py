"""Runs of TRL's trainers on a tiny pair: ten steps in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl
from datasets import Dataset

from tests.tiny import char_tokenizer, tiny_llama

SETTINGS: dict[str, Any] = {
    "max_steps": 10,
    "per_device_train_batch_size": 2,
    "learning_rate": 3e-3,
    "bf16": False,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "activation_checkpointing": False,
}


def tokenizer() -> Any:
    made = char_tokenizer()
    made.padding_side = "left"
    return made


def trainer(
    directory: Path,
    make: Any = trl.DistillationTrainer,
    student: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **others: Any,
) -> Any:
    """A distillation trainer; `student` and `teacher` change the models, `settings` the config."""
    changed = {"max_completion_length": 5, **SETTINGS, **(settings or {})}
    return make(
        tiny_llama(0, num_hidden_layers=1, **(student or {})),
        tiny_llama(1, num_hidden_layers=1, hidden_size=48, **(teacher or {})),
        trl.DistillationConfig(str(directory), **changed),
        train_dataset=Dataset.from_dict({"prompt": [f"{i}+{i + 1}=" for i in range(16)]}),
        processing_class=tokenizer(),
        **others,
    )


def logged(trained: Any, name: str = "loss") -> list[float]:
    """What each step logged."""
    return [row[name] for row in trained.state.log_history if name in row]


def losses(trained: Any) -> list[float]:
    """The losses of the steps of a run, which is made here."""
    trained.train()
    return logged(trained)
