"""Runs whose process is killed, whose disk is full, and whose checkpoints are damaged."""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from esr_train import checkpoint
from esr_train.checkpoint import CheckpointError
from esr_train.config import Config, load_config, to_yaml
from tests.test_checkpoint import curve
from tests.test_lora import lora_config
from tests.test_train import build
from tests.tiny import MakeConfig

Start = Callable[..., "Child"]
FULL = {"optim__schedule": "constant"}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes by fork")


class Child:
    """A process that trains, and what it says: "saving" at the start of each save, then how it
    ended."""

    def __init__(self, context: Any, config: Path, directory: Path, limit: int | None) -> None:
        self.said, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_train, args=(config, directory, limit, theirs))
        self.process.start()
        theirs.close()

    def end(self) -> str:
        """How it ended."""
        while (text := self.said.recv()) == "saving":
            pass
        self.process.join()
        return text


def _train(config: Path, directory: Path, limit: int | None, parent: Connection) -> None:
    torch.set_num_threads(1)
    trainer = build(load_config(config), directory, save=True)
    real = checkpoint.save

    def save(*arguments: Any) -> Path:
        parent.send("saving")
        if limit is not None and arguments[1]["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return real(*arguments)

    checkpoint.save = save
    try:
        trainer.run()
        parent.send("trained")
    except CheckpointError as error:
        parent.send(str(error))


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts a `Child`. They are forks of one process that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    children: list[Child] = []

    def started(config: Path, directory: Path, limit: int | None = None) -> Child:
        children.append(Child(context, config, directory, limit))
        return children[-1]

    yield started
    for child in children:
        child.process.kill()
        child.process.join()
    # Tests of workers count the processes that are left.
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


def write_config(path: Path, config: Config) -> Path:
    path.write_text(to_yaml(config))
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.name}/{name}": tensor
        for file in sorted(path.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("full", 3),
        ("lora", 3),
        pytest.param("full", 20, marks=pytest.mark.slow),
        pytest.param("lora", 20, marks=pytest.mark.slow),
    ],
)
def test_sigkill_in_a_save_loses_at_most_that_save(
    make_config: MakeConfig, tmp_path: Path, start: Start, kind: str, kills: int
) -> None:
    """Each process is killed at a random moment of its second save; the next one goes on."""
    changes = {"checkpoint__every": 1, "checkpoint__keep": 1, "eval__every": 2}

    def make(steps: int) -> Config:
        if kind == "lora":
            return lora_config(make_config, steps=steps, **changes)
        return make_config(steps=steps, **changes, **FULL)

    killed, moments = tmp_path / "killed", random.Random(kills)
    path = write_config(tmp_path / "config.yaml", make(1000))
    directory, reached, hit = killed / "checkpoints", 0, 0
    for _ in range(kills):
        child = start(path, killed)
        assert child.said.recv() == "saving"
        begun = time.perf_counter()
        assert child.said.recv() == "saving"
        # A step and a save have taken so long: about half of the moments are in the save.
        time.sleep(moments.random() * (time.perf_counter() - begun))
        child.process.kill()
        child.process.join()
        hit += bool(list(directory.glob(".*")))
        newest = checkpoint.latest(directory)
        assert newest is not None and checkpoint._number(newest) > reached
        reached = checkpoint._number(newest)
    assert hit or kills < 20, "no kill fell into a save"
    write_config(path, make(reached + 1))
    assert start(path, killed).end() == "trained"
    assert not list(directory.glob(".*"))
    build(make(reached + 1), tmp_path / "through", save=True).run()
    for name in ("metrics.jsonl", "evals.jsonl"):
        assert curve(killed, name) == curve(tmp_path / "through", name)
    found, expected = (
        tensors(run / "checkpoints" / f"step_{reached + 1:06d}")
        for run in (killed, tmp_path / "through")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def check_goes_on(config: Path, directory: Path, start: Start, whole: Path) -> None:
    """The checkpoint of step 2 is intact, and with room the run ends as it would have."""
    newest = checkpoint.latest(directory / "checkpoints")
    assert newest is not None and newest.name == "step_000002"
    assert start(config, directory).end() == "trained"
    assert curve(directory) == curve(whole) and len(curve(whole)) == 4


def test_a_file_that_cannot_be_written_whole_leaves_the_checkpoint_before(
    make_config: MakeConfig, tmp_path: Path, start: Start
) -> None:
    config = make_config(steps=4, checkpoint__every=1, eval__every=0, **FULL)
    path = write_config(tmp_path / "config.yaml", config)
    said = start(path, tmp_path / "run", 30_000).end()
    assert "step_000003 was not written" in said and "File too large" in said
    assert said.endswith("earlier ones are intact")
    build(config, tmp_path / "whole").run()
    check_goes_on(path, tmp_path / "run", start, tmp_path / "whole")


def test_a_full_disk_leaves_the_checkpoint_before(
    make_config: MakeConfig, tmp_path: Path, start: Start
) -> None:
    """A file system with room for two and a half checkpoints, of which the third is the fourth."""
    config = make_config(steps=4, checkpoint__every=1, eval__every=0, **FULL)
    path = write_config(tmp_path / "config.yaml", config)
    build(config, tmp_path / "whole", save=True).run()
    size = sum(f.stat().st_size for f in (tmp_path / "whole").rglob("*") if f.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 4}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        said = start(path, disk / "run").end()
        assert "step_000003 was not written" in said and "No space left on device" in said
        assert not list((disk / "run" / "checkpoints").glob(".*"))
        subprocess.run([*mount[:4], f"remount,size={size * 3}", *mount[5:]], check=True)
        check_goes_on(path, disk / "run", start, tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink], ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize("file", ["optimizer.safetensors", "model/model.safetensors", "files.json"])
def test_a_damaged_checkpoint_is_skipped_and_named(
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    file: str,
) -> None:
    config = make_config(steps=3, checkpoint__every=1, eval__every=0, **FULL)
    build(config, tmp_path, save=True).run()
    before = curve(tmp_path)
    directory = tmp_path / "checkpoints"
    damage(directory / "step_000003" / file)
    trainer = build(config, tmp_path, save=True)
    trainer._resume()
    assert trainer.state["step"] == 2
    assert "step_000003 is damaged and skipped" in caplog.text
    assert Path(file).name in caplog.text
    build(config, tmp_path, save=True).run()
    assert curve(tmp_path) == before
    newest = checkpoint.latest(directory)
    assert newest is not None and newest.name == "step_000003"


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_others(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=4, checkpoint__every=2, eval__every=0, **FULL)
    build(config, tmp_path, save=True).run()
    _cut(tmp_path / "checkpoints" / "step_000004" / "optimizer.safetensors")
    config = make_config(steps=3, checkpoint__every=1, eval__every=0, **FULL)
    build(config, tmp_path, save=True).run()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000003"]


def test_the_best_model_is_kept_and_survives_a_resumed_run(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {0: 0.0, 1: 0.5, 2: 0.1, 3: 0.4, 4: 0.9}  # the lowest wins, the initial model aside
    changes = {"report__metric": "m", "report__higher_is_better": False, "checkpoint__every": 1}
    weights = {}

    def run(steps: int) -> None:
        config = make_config(steps=steps, eval__every=1, **changes, **FULL)
        trainer = build(config, tmp_path, save=True)

        def evaluate() -> Any:
            step = trainer.state["step"]
            weights[step] = trainer.student.lm_head.weight.detach().clone()
            return {"m": values[step]}, []

        monkeypatch.setattr(trainer.evaluator, "evaluate", evaluate)
        trainer.run()

    run(3)
    run(4)
    found = checkpoint.best(tmp_path / "checkpoints")
    assert found is not None and found.name == "best_000002"
    assert torch.equal(load_file(found / "model.safetensors")["lm_head.weight"], weights[2])
    assert [path.name for path in (tmp_path / "checkpoints").glob("best_*")] == ["best_000002"]
