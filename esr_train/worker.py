"""Runs of a comparison side by side, in worker processes of one thread each.

A worker is `python -m esr_train.worker RUN_DIR`. It loads the models once and trains one (arm,
seed) after another. It reads them from stdin, one JSON object a line, and writes to stdout, in the
same format, each step's metrics and how each run ended. What libraries print goes to stderr.

A worker ends when its stdin closes, which happens however the parent ends. It has its own
session, so that only the parent receives Ctrl-C from a terminal, and kills the workers: what they
have written is flushed, and an unfinished checkpoint is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from esr_train.arms import Arms
from esr_train.checkpoint import Interrupt
from esr_train.config import load_config
from esr_train.train import TrainingError

Run = tuple[str, int]  # arm, seed
Event = dict[str, Any]
OnStep = Callable[[str, int, dict[str, Any], dict[str, float]], None]


class ArmError(RuntimeError):
    """A run that failed in its worker; the message names the arm and the seed."""


def run_side_by_side(
    run_dir: Path, runs: list[Run], jobs: int, on_step: OnStep, on_finished: Callable[[Run], None]
) -> None:
    """Train all `runs` of the comparison in `run_dir`, `jobs` at a time.

    Raises:
        ArmError: a run failed or its process ended; the others are stopped.
        KeyboardInterrupt: SIGINT or SIGTERM; all are stopped.
    """
    events: queue.Queue[tuple[_Worker, Event | None]] = queue.Queue()
    waiting, workers = iter(runs), []
    try:
        with Interrupt():
            for run in islice(waiting, jobs):
                workers.append(_Worker(run_dir, run, events))
            running = len(workers)
            while running:
                worker, event = events.get()
                if event is None:
                    raise ArmError(f"{worker.name}: {worker.how_it_ended()}")
                if "error" in event:
                    raise ArmError(f"{worker.name}: {event['error']}")
                if "row" in event:
                    on_step(*worker.run, event["row"], event["metrics"])
                    continue
                on_finished(worker.run)
                following = next(waiting, None)
                if following is None:
                    running -= 1
                else:
                    worker.start(following)
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """The parent's side of a worker process, which starts with `run`."""

    def __init__(
        self, run_dir: Path, run: Run, events: queue.Queue[tuple[_Worker, Event | None]]
    ) -> None:
        package = str(Path(__file__).parents[1])
        paths = [package, os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "esr_train.worker", str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Read by OpenMP when torch is imported.
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            start_new_session=True,
            text=True,
        )
        self.start(run)
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    @property
    def name(self) -> str:
        return f"{self.run[0]} seed {self.run[1]}"

    def start(self, run: Run) -> None:
        self.run = run
        assert self.process.stdin is not None
        # If the process has ended, the end of its stdout reports that.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(run) + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def how_it_ended(self) -> str:
        code = self.process.wait()
        if code >= 0:
            return f"its process ended with exit code {code}"
        advice = "; if memory ran out, use fewer --jobs" if -code == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-code).name}{advice}"

    def _read(self, events: queue.Queue[tuple[_Worker, Event | None]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                events.put((self, json.loads(line)))
        events.put((self, None))


def main() -> None:
    """The worker's side: train what stdin names, until it closes."""
    run_dir = Path(sys.argv[1])
    parent = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(**event: Any) -> None:
        parent.write(json.dumps(event) + "\n")
        parent.flush()

    runs: queue.Queue[Run] = queue.Queue()
    threading.Thread(target=_receive, args=(runs,), daemon=True).start()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        arms = Arms(load_config(run_dir / "config.yaml"))
        while True:
            name, seed = runs.get()
            arms.run(run_dir, name, seed, lambda row, metrics: send(row=row, metrics=metrics))
            send(finished=True)
    except TrainingError as error:
        send(error=str(error))
    except Exception as error:
        traceback.print_exc()
        send(error=f"{type(error).__name__}: {error}")


def _receive(runs: queue.Queue[Run]) -> None:
    for line in sys.stdin:
        runs.put(json.loads(line))
    os._exit(0)  # without waiting for the main thread: nothing reads its results any more


if __name__ == "__main__":
    main()
