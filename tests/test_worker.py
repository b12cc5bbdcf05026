"""Runs side by side: the same metrics, failures that are named, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esr_train.arms import Arms
from esr_train.compare import compare, default_jobs
from esr_train.metrics import read_rows
from esr_train.run_dir import write_run_files
from esr_train.worker import ArmError, run_side_by_side
from tests.tiny import MakeConfig

ARMS = [{"name": "esr-3", "max_new_tokens": 3}, {"name": "full", "max_new_tokens": 6}]
TIMINGS = ("seconds", "peak_bytes", "train_seconds")

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="processes are found in /proc"
)


def without_timings(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of every file of a comparison."""
    return {
        str(path.relative_to(run_dir)): [
            {key: value for key, value in row.items() if key not in TIMINGS}
            for row in read_rows(path)
        ]
        for path in sorted(run_dir.rglob("*.jsonl"))
    }


def children(process: int) -> list[int]:
    """Ids of the processes that a process has started and that have not ended, without the tracker
    of shared memory that multiprocessing leaves behind in other tests."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in path.read_text().split():
            try:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended just now
            if b"multiprocessing.resource_tracker" not in command:
                found.append(int(child))
    return found


def test_runs_side_by_side_have_the_metrics_of_runs_in_turn(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(arms=ARMS, seeds=[0, 1])
    said: list[str] = []
    compare(config, tmp_path / "one", jobs=1, say=said.append)
    compare(config, tmp_path / "two", jobs=2, say=said.append)
    in_turn, together = without_timings(tmp_path / "one"), without_timings(tmp_path / "two")
    assert in_turn == together
    assert len(together) == 12 and all(together.values())
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert (environment["jobs"], environment["threads"]) == (2, 1)
    assert (
        "2 runs at a time, each in a process with 1 CPU thread"
        in (tmp_path / "two" / "report.md").read_text()
    )
    assert said[5].startswith("4 runs, 2 at a time on one thread each: up to ")
    assert not children(os.getpid())


def test_a_failing_run_is_named_and_stops_the_others(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """It fails in its second step; the other would go on for minutes."""
    arms = [{"name": "boom", "max_new_tokens": 3, "optim.lr": 1e30}, ARMS[1]]
    config = make_config(arms=arms, steps=10_000, eval__every=0)
    with pytest.raises(ArmError, match=r"^boom seed 0: step \d+: loss nan.*optim.lr"):
        compare(config, tmp_path, jobs=2, say=lambda text: None)
    assert not children(os.getpid())


def wait_until_gone(process: int) -> None:
    for _ in range(100):
        if not Path(f"/proc/{process}").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} is still there")


@pytest.fixture
def long_run(make_config: MakeConfig, tmp_path: Path) -> Path:
    """The directory of a comparison with one run, which takes many minutes."""
    write_run_files(tmp_path, make_config(arms=ARMS[:1], steps=100_000, eval__every=0), jobs=2)
    return tmp_path


def run_until(run_dir: Path, number: int, interrupt: Callable[[int], None]) -> None:
    """Train in a worker, and call `interrupt` with the id of its process at a step."""

    def on_step(name: str, seed: int, row: dict[str, Any], metrics: dict[str, float]) -> None:
        if row["step"] == number:
            [worker] = children(os.getpid())
            interrupt(worker)

    run_side_by_side(run_dir, [("esr-3", 0)], 1, on_step, lambda run: None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupt_leaves_no_process(long_run: Path, number: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_until(long_run, 3, lambda worker: os.kill(os.getpid(), number))
    assert not children(os.getpid())
    assert [row["step"] for row in read_rows(next(long_run.rglob("metrics.jsonl")))][:3] == [
        1,
        2,
        3,
    ]


def test_a_killed_run_is_named(long_run: Path) -> None:
    with pytest.raises(ArmError, match="^esr-3 seed 0: its process was killed by SIGKILL"):
        run_until(long_run, 2, lambda worker: os.kill(worker, signal.SIGKILL))
    assert not children(os.getpid())


def test_a_worker_ends_with_its_parent(long_run: Path) -> None:
    """However a parent ends, the pipe to the worker closes."""
    script = (
        "import sys; from pathlib import Path; from tests.test_worker import run_until;"
        "run_until(Path(sys.argv[1]), 1, lambda worker: print(worker, flush=True))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(long_run)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.communicate()
    wait_until_gone(worker)


def test_small_models_on_a_cpu_get_a_process_for_each_thread(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = Arms(make_config(arms=ARMS, eval__every=0))
    torch.set_num_threads(3)
    if not torch.cuda.is_available():
        assert default_jobs(arms) == 3
    monkeypatch.setattr("esr_train.compare.SMALL_PARAMETERS", 1000)
    assert default_jobs(arms) == 1
