"""Checkpoints: an interrupted save leaves the last one intact; a resumed run repeats bit for bit.

    checkpoints/step_000010/model/              Hugging Face format, or an adapter as peft stores it
                           /optimizer.safetensors
                           /trainer_state.json  step, seconds and tokens so far
                           /files.json          size and SHA-256 of the others
    checkpoints/best_000008/                    the model that was best in an evaluation

A directory is written under another name and renamed when it is complete. `resume` skips
with a warning those whose files are not the ones in files.json, after a crash or on a bad disk. All
randomness is a function of (seed, step), so there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
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
from torch import Tensor

from esr_train import adapters
from esr_train.optim import Optimizer

_STEP, _BEST, _WRITING, _REPLACED = "step_", "best_", ".writing-", ".replaced-"
_FILES = "files.json"
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; earlier ones are untouched."""


def save(
    directory: Path,
    state: dict[str, Any],
    model: Any,
    tokenizer: Any,
    optimizer: Optimizer,
    keep: int = 2,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write checkpoint state["step"] under a temporary name, rename it, keep the newest `keep`.

    `weights` are those of the model, where it does not have them itself.

    Raises:
        CheckpointError: it could not be written (disk full, ...); earlier checkpoints are intact.
    """
    step = state["step"]
    with _aside(directory / f"{_STEP}{step:06d}") as path:
        _save_model(model, tokenizer, path / "model", weights)
        tensors = {k: v.contiguous() for k, v in optimizer.state_tensors().items()}
        save_file(tensors, path / "optimizer.safetensors")
        (path / "trainer_state.json").write_text(json.dumps(state))
        (path / _FILES).write_text(json.dumps(_digests(path), indent=2))
    # Those of later steps are damaged: `resume` skipped them.
    older = [path for path in _all(directory, _STEP) if _number(path) <= step]
    for path in set(_all(directory, _STEP)) - set(older[-keep:]):
        shutil.rmtree(path, ignore_errors=True)
    return directory / f"{_STEP}{step:06d}"


def save_best(
    directory: Path,
    step: int,
    model: Any,
    tokenizer: Any,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write the model of a step, then remove the best one before it; `weights` as in `save`.

    Raises:
        CheckpointError: it could not be written; the best one so far is intact.
    """
    target = directory / f"{_BEST}{step:06d}"
    with _aside(target) as path:
        _save_model(model, tokenizer, path, weights)
    for path in _all(directory, _BEST):
        if path != target:
            shutil.rmtree(path, ignore_errors=True)
    return target


def latest(directory: Path) -> Path | None:
    """The newest intact checkpoint, or None; logs a warning for each damaged one."""
    for path in reversed(_all(directory, _STEP)):
        problem = _damage(path)
        if not problem:
            return path
        logger.warning("checkpoint %s is damaged and skipped: %s", path, problem)
    return None


def best(directory: Path) -> Path | None:
    """The best model so far, or None."""
    return next(reversed(_all(directory, _BEST)), None)


def resume(directory: Path, model: Any, optimizer: Optimizer) -> dict[str, Any] | None:
    """Put weights and optimizer state of the newest intact checkpoint in place.

    Returns the state that `save` was given, None if there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none is intact or fits this model.
    """
    _clear(directory)
    path = latest(directory)
    if path is not None:
        return load(path, model, optimizer)
    if _all(directory, _STEP):
        raise CheckpointError(
            f"no checkpoint in {directory} is intact; remove them all to start again"
        )
    return None


def load(path: Path, model: Any, optimizer: Optimizer) -> dict[str, Any]:
    """Put weights and optimizer state back in place; returns the state that `save` was given."""
    try:
        state: dict[str, Any] = json.loads((path / "trainer_state.json").read_text())
        tensors = load_file(path / "optimizer.safetensors")
        if adapters.is_adapted(model):
            adapters.put_adapter(model, load_file(path / "model" / adapters.WEIGHTS))
        else:
            stored = type(model).from_pretrained(path / "model", dtype=model.dtype)
            model.load_state_dict(stored.state_dict())
        optimizer.load_state_tensors(tensors)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be resumed from: {error}") from error
    return state


def _save_model(
    model: Any, tokenizer: Any, directory: Path, weights: dict[str, Tensor] | None
) -> None:
    if adapters.is_adapted(model):
        adapters.save_adapter(model, directory, weights)
    else:
        model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `target` at the end, or nothing after an error."""
    directory = target.parent
    temporary, replaced = (
        directory / (_WRITING + target.name),
        directory / (_REPLACED + target.name),
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clear(directory)
        yield temporary
        if target.exists():  # the same step again: a directory cannot be renamed over another
            os.replace(target, replaced)
        os.replace(temporary, target)
    except Exception as error:  # safetensors reports a full disk by an error class of its own
        raise CheckpointError(
            f"checkpoint {target} was not written ({type(error).__name__}: {error}); "
            "earlier ones are intact"
        ) from error
    finally:
        _clear(directory)


def _clear(directory: Path) -> None:
    """Remove what a failed or killed save has left; restore what it was about to replace."""
    for path in list(directory.glob(_REPLACED + "*")):
        target = directory / path.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, target)
    for path in list(directory.glob(_WRITING + "*")):
        shutil.rmtree(path, ignore_errors=True)


def _all(directory: Path, kind: str) -> list[Path]:
    """Checkpoints, or best models, from the oldest to the newest."""
    return sorted(directory.glob(kind + "*"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.split("_")[1])


def _digests(directory: Path) -> dict[str, list[Any]]:
    """[size, SHA-256] of each file, by its path in the directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != _FILES:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            name = path.relative_to(directory).as_posix()
            found[name] = [path.stat().st_size, digest.hexdigest()]
    return found


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint; "" if they are intact."""
    try:
        expected = json.loads((path / _FILES).read_text())
        found = _digests(path)
    except (OSError, ValueError) as error:
        return f"{_FILES}: {error}"
    for name, digest in expected.items():
        if found.get(name) != digest:
            return f"{name} is not the file that was saved" if name in found else f"no {name}"
    return ""


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
