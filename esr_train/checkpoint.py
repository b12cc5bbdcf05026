"""Checkpoints: an interrupted save leaves the last one intact; a resumed run repeats bit for bit.

    checkpoints/step_000010/model/              Hugging Face format, what `from_pretrained` loads
                           /optimizer.safetensors
                           /trainer_state.json  step, seconds and tokens so far
    checkpoints/latest                          name of the newest complete one

All randomness is a function of (seed, step), so there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from esr_train.optim import Optimizer

KEEP = 2  # newest checkpoints kept
_WRITING, _REPLACED = ".writing-", ".replaced-"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; earlier ones are untouched."""


def save(
    directory: Path, state: dict[str, Any], model: Any, tokenizer: Any, optimizer: Optimizer
) -> Path:
    """Write checkpoint state["step"] under a temporary name, then rename it.

    Raises:
        CheckpointError: it could not be written (disk full, ...); earlier checkpoints are intact.
    """
    name = f"step_{state['step']:06d}"
    temporary, target = directory / (_WRITING + name), directory / name
    replaced = directory / (_REPLACED + name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        model.save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        tensors = {k: v.contiguous() for k, v in optimizer.state_tensors().items()}
        save_file(tensors, temporary / "optimizer.safetensors")
        (temporary / "trainer_state.json").write_text(json.dumps(state))
        if target.exists():  # the same step again: a directory cannot be renamed over another
            os.replace(target, replaced)
        os.replace(temporary, target)
        (directory / ".latest").write_text(name)
        os.replace(directory / ".latest", directory / "latest")
    except Exception as error:  # safetensors has its own error class for a full disk
        raise CheckpointError(
            f"checkpoint {target} was not written ({type(error).__name__}: {error}); "
            "earlier ones are intact"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    # Incomplete checkpoints have other names, so all that match are complete.
    for old in (replaced, *sorted(directory.glob("step_*"))[:-KEEP]):
        shutil.rmtree(old, ignore_errors=True)
    return target


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    pointer = directory / "latest"
    return directory / pointer.read_text().strip() if pointer.is_file() else None


def load(path: Path, model: Any, optimizer: Optimizer) -> dict[str, Any]:
    """Restore weights and optimizer state in place; returns the state that was passed to `save`."""
    try:
        stored = AutoModelForCausalLM.from_pretrained(path / "model", dtype=model.dtype)
        model.load_state_dict(stored.state_dict())
        optimizer.load_state_tensors(load_file(path / "optimizer.safetensors"))
        state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text())
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be resumed from: {error}") from error
    return state


class Interrupt:
    """Raises KeyboardInterrupt on SIGINT and SIGTERM; inside `hold`, at its end.

    So an update of the weights is completed, and anything else is interrupted at once.
    """

    def __init__(self) -> None:
        self._holding = self._pending = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # only it receives signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self._holding:
            raise KeyboardInterrupt
        self._pending = True
