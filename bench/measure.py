"""Timing contenders against each other, and the memory that one of them takes."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from esr_train.metrics import cpu_name

MIB = 1 << 20
_RESULTS = Path(__file__).parent / "results"


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn round after round so that drift hits all alike.

    A warming round comes first, and is dropped, unless `warm` is False: all have run before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(0 if warm else 1, rounds + 1):
        for name, run in runs.items():
            gc.collect()
            _synchronize()
            start = clock()
            run()
            _synchronize()
            if round_number:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def extra_bytes(run: Callable[[], object]) -> int | None:
    """Peak memory of `run` above what was there before it; None where it cannot be had.

    Device memory on CUDA; on Linux the process's resident high-water mark, reset by the kernel.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) * 1024


def record(
    name: str, problem: str, rounds: int, table: Mapping[str, object], **more: object
) -> None:
    """Append a result, with where it was measured and `more`, to bench/results/NAME.jsonl."""
    line = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "problem": problem,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "rounds": rounds,
        **more,
        "table": table,
    }
    _RESULTS.mkdir(exist_ok=True)
    with (_RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
