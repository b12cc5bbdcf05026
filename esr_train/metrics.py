"""The log of a run: JSON lines, a step's row of them, seconds and peak memory of each phase."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from esr_train.rollout import RolloutBatch

# Averages over the trained tokens of a step.
PER_TOKEN = ("divergence", "student_entropy", "teacher_entropy", "agreement")
# The same of a teacher that is known by its most probable tokens: both models' probability of them.
TOP_MASS = ("student_top_mass", "teacher_top_mass")
# With other tokenizers: the share of each model's probability that is on tokens of both.
SHARED = ("student_shared_mass", "teacher_shared_mass")
_OF_TOKENS = (*PER_TOKEN, *TOP_MASS, "cross_entropy")
_GRAM = 4  # tokens in a run that counts as repeated


def step_row(
    step: int,
    sums: dict[str, float],
    batch: RolloutBatch,
    generated: int,
    update: dict[str, Any],
    spans: Spans,
) -> dict[str, Any]:
    """A row of metrics.jsonl.

    `sums` is over the trained tokens: loss, trained_tokens, the names of the criterion and, with
    other tokenizers, aligned_share and SHARED.
    `generated` is how many tokens were sampled for the step, `update` what there is to say of the
    optimizer's step and of the engine.
    """
    trained, tokens = max(1, int(sums["trained_tokens"])), int(batch.lengths.sum())
    return {
        "step": step,
        "loss": sums["loss"],
        **{key: sums[key] / trained for key in _OF_TOKENS if key in sums},
        **{key: sums[key] for key in ("aligned_share", *SHARED) if key in sums},
        "response_length": tokens / len(batch.prompts),
        "eos_rate": float(batch.finished_by_eos.double().mean()),
        "repetition": repetition(batch),
        "tokens": generated,
        "trained_tokens": int(sums["trained_tokens"]),
        **update,
        "seconds": spans.seconds,
        "peak_bytes": spans.peak_bytes,
    }


def repetition(batch: RolloutBatch) -> float:
    """Share of the runs of four tokens that their response already had; 0 where none is so long."""
    grams = repeated = 0
    for row in range(len(batch.prompts)):
        ids = batch.response(row)
        found = [tuple(ids[start : start + _GRAM]) for start in range(len(ids) - _GRAM + 1)]
        grams, repeated = grams + len(found), repeated + len(found) - len(set(found))
    return repeated / grams if grams else 0.0


class JsonLines:
    """A file of one JSON object a line, flushed at every write; rows past `last_step` are cut."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [row for row in read_rows(path) if row["step"] <= last_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self.steps = {row["step"] for row in kept}
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.steps.add(row["step"])

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a JSON lines file; a last line without a line break is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


class Spans:
    """Seconds and peak bytes of named phases.

    For a phase that is entered several times, seconds add up and the largest peak is kept.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int | None] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        memory = PeakMemory()
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        peaks = [p for p in (self.peak_bytes.get(name), memory.bytes()) if p is not None]
        self.peak_bytes[name] = max(peaks, default=None)

    def charge(self, name: str, seconds: float) -> None:
        """Add the time of what was done for this phase earlier."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class PeakMemory:
    """A new high-water mark: of CUDA's allocator, or on Linux of the process's resident set.

    There is one mark in a process, so only the newest `PeakMemory` can be read.
    """

    def __init__(self) -> None:
        self.known = True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return
        if sys.platform == "linux":
            # Otherwise freed memory that is not returned to the system counts for the next phase.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
            if trim is not None:
                trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not Linux, or a container that refuses it
            self.known = False

    def bytes(self) -> int | None:
        """Bytes at the high-water mark since this object was made; None if that is unknown."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not self.known:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


def cpu_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
