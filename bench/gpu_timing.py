"""Times, peak memory, clocks and power of what `gpu_suite` runs on a GPU, or rehearses on a CPU."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.measure import MIB, extra_bytes

# Whether the user wants kernels interpreted; read before the tests' modules, which set it.
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_MOST_RUNS = 50
_FLUSH_BYTES = 256 * MIB  # more than any L2
# Cycles that the GPU waits before a run, 2.5 ms: so far the host is ahead, as it is in a training
# loop. The host's own time is measured beside it.
_HEAD_START = 5_000_000

Record = dict[str, Any]
Part = tuple[str, Callable[[], Record]]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds_of(run: Callable[[], object], budget: float) -> tuple[list[float], list[float]]:
    """(seconds of the device, of the host) of each of up to `_MOST_RUNS` warm runs, at least 3,
    about `budget` in all.

    On a GPU the time between events: the device's, unless the host takes longer to launch than its
    head start and what is launched take. The host's time is that until the call returns.
    """
    on_gpu = torch.cuda.is_available()
    for _ in range(3 if on_gpu else 1):
        run()
    flush = torch.empty(_FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=device())
    measured: list[float] = []
    of_host: list[float] = []
    began = time.perf_counter()
    while len(measured) < 3 or (
        len(measured) < _MOST_RUNS and time.perf_counter() - began < budget
    ):
        flush.zero_()
        if not on_gpu:
            start = time.perf_counter()
            run()
            of_host.append(time.perf_counter() - start)
            measured.append(of_host[-1])
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(_HEAD_START)
        events[0].record()
        start = time.perf_counter()
        run()
        of_host.append(time.perf_counter() - start)
        events[1].record()
        torch.cuda.synchronize()
        measured.append(events[0].elapsed_time(events[1]) / 1e3)
    return measured, of_host


def timed(run: Callable[[], object], budget: float, returned_bytes: int = 0) -> Record:
    """Milliseconds, and MiB at the peak beyond inputs and what is returned."""
    times, of_host = seconds_of(run, budget)
    times = sorted(times)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    peak = extra_bytes(run)
    return {
        "ms": 1e3 * statistics.median(times),
        "ms p10": 1e3 * deciles[0],
        "ms p90": 1e3 * deciles[-1],
        "host ms": 1e3 * statistics.median(of_host),
        "runs": len(times),
        "extra MiB": None if peak is None else (peak - returned_bytes) / MIB,
    }


def once(run: Callable[[], object], repeats: int = 2) -> float:
    """Seconds of the fastest of a few runs that take seconds, after one that warms up."""
    best = float("inf")
    for number in range(1 + repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best


class Clocks:
    """Clocks and power of the first GPU, from one `nvidia-smi` that prints five times a second."""

    FIELDS = {"SM MHz": "clocks.sm", "memory MHz": "clocks.mem", "W": "power.draw"}

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clocks:
        command = ["nvidia-smi", "--id=0", "--format=csv,noheader,nounits", "--loop-ms=200"]
        command.append("--query-gpu=" + ",".join(self.FIELDS.values()))
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return self  # no such program: nothing is recorded
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                values = [float(value) for value in line.split(",")]
            except ValueError:
                continue  # "[N/A]"
            self._samples.append((time.perf_counter(), values))

    def during(self, began: float, ended: float) -> Record:
        """Medians of what was read between two `time.perf_counter()`; nothing if nothing was."""
        inside = [values for at, values in self._samples if began <= at <= ended]
        columns = zip(self.FIELDS, zip(*inside, strict=True), strict=False)
        return {name: statistics.median(values) for name, values in columns}
