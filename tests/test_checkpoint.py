from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from esr_train import checkpoint
from esr_train.checkpoint import CheckpointError, Interrupt
from esr_train.config import to_yaml
from esr_train.metrics import read_rows
from esr_train.train import Trainer
from tests.test_train import build
from tests.tiny import MakeConfig

LONG = {"steps": 4, "eval__every": 2, "optim__schedule": "constant"}


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def curve(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    timing = ("seconds", "peak_bytes", "train_seconds")
    rows = read_rows(directory / name)
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


@pytest.mark.parametrize("stop", [2, 3])
def test_two_and_two_steps_are_four(make_config: MakeConfig, tmp_path: Path, stop: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    build(make_config(**LONG), whole, save=True).run()
    build(make_config(**{**LONG, "steps": stop}), parts, save=True).run()
    build(make_config(**LONG), parts, save=True).run()
    assert curve(parts) == curve(whole) and len(curve(whole)) == 4
    name = "checkpoints/step_000004"
    for file in ("model/model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(directory / name / file) for directory in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    evals = [row for row in curve(parts, "evals.jsonl") if row["step"] in (0, 2, 4)]
    assert evals == curve(whole, "evals.jsonl")


def test_rows_past_the_checkpoint_are_written_anew(make_config: MakeConfig, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    build(make_config(**LONG), whole).run()
    trainer = build(make_config(**LONG, checkpoint__every=1), killed, save=True)
    real = trainer._save

    def dies_at_three() -> None:  # as a power cut would: the row is there, the checkpoint is not
        if trainer.state["step"] < 3:
            real()

    trainer._save = dies_at_three  # type: ignore[method-assign]
    trainer.run()
    assert len(curve(killed)) == 4
    build(make_config(**LONG), killed, save=True).run()
    assert curve(killed) == curve(whole)
    assert curve(killed, "evals.jsonl") == curve(whole, "evals.jsonl")


def test_the_checkpoint_is_a_hugging_face_model(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = build(make_config(steps=1), tmp_path, save=True)
    trainer.run()
    path = checkpoint.latest(tmp_path / "checkpoints")
    assert path is not None
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, trainer.student(ids).logits)
    assert not list(path.rglob("*.bin")) and not list(path.rglob("*.pt"))


def test_only_the_newest_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    build(make_config(**LONG, checkpoint__every=1), tmp_path, save=True).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == ["step_000003", "step_000004"]


@pytest.fixture
def saved(make_config: MakeConfig, tmp_path: Path) -> tuple[Trainer, Path, dict[str, bytes]]:
    trainer = build(make_config(steps=2, eval__every=0), tmp_path, save=True)
    trainer.run()
    directory = tmp_path / "checkpoints"
    return trainer, directory, files(directory)


@pytest.mark.parametrize("step", [2, 3], ids=["same step", "next step"])
@pytest.mark.parametrize(
    ("target", "name", "error"),
    [
        (checkpoint, "save_file", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (os, "replace", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (Path, "write_text", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        (checkpoint, "save_file", KeyboardInterrupt()),
    ],
    ids=["weights", "rename", "text", "killed"],
)
def test_a_save_that_fails_leaves_the_previous_one_whole(
    saved: tuple[Trainer, Path, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    error: BaseException,
    step: int,
) -> None:
    trainer, directory, before = saved
    trainer.state["step"], trainer.saved_step = step, -1

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
            trainer._save()
    if isinstance(error, OSError):
        message = r"No space left on device.*earlier ones are intact"
        assert re.search(message, str(caught.value))
    assert files(directory) == before
    assert checkpoint.latest(directory) == directory / "step_000002"
    trainer._save()  # and the next one works
    assert checkpoint.latest(directory) == directory / f"step_{step:06d}"


def test_a_damaged_checkpoint_is_one_clear_error(
    saved: tuple[Trainer, Path, dict[str, bytes]], make_config: MakeConfig
) -> None:
    _, directory, _ = saved
    (directory / "step_000002" / "optimizer.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
        build(make_config(), directory.parent, save=True).run()


def test_resume_never_does_not_touch_what_is_there(
    saved: tuple[Trainer, Path, dict[str, bytes]], make_config: MakeConfig
) -> None:
    _, directory, before = saved
    with pytest.raises(CheckpointError, match="checkpoint.resume is never"):
        build(make_config(checkpoint__resume="never"), directory.parent, save=True).run()
    assert files(directory) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_waits_for_the_update(number: int) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with Interrupt() as interrupt:
            with interrupt.hold():
                os.kill(os.getpid(), number)
                reached.append("end of update")
            reached.append("after it")
    assert reached == ["end of update"]
    with pytest.raises(KeyboardInterrupt):
        with Interrupt():
            os.kill(os.getpid(), number)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stopped_run_saves_and_resumes_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    config_path, out = tmp_path / "config.yaml", tmp_path / "run"
    config_path.write_text(to_yaml(make_config(steps=100_000, eval__every=0)))
    command = [sys.executable, "-m", "esr_train", "train", str(config_path), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    directory = out / "arms" / "train" / "seed0"
    for _ in range(600):
        if len(read_rows(directory / "metrics.jsonl")) >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert "interrupted: step" in last and "Traceback" not in errors
    done = read_rows(directory / "metrics.jsonl")[-1]["step"]
    newest = checkpoint.latest(directory / "checkpoints")
    assert newest is not None and newest.name == f"step_{done:06d}"
    assert f"step {done} of 100000 is saved" in last

    build(make_config(steps=done + 1, eval__every=0), directory, save=True).run()
    build(make_config(steps=done + 1, eval__every=0), tmp_path / "whole").run()
    assert curve(directory) == curve(tmp_path / "whole")
