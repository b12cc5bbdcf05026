"""One command for the day a GPU is at hand: is everything right, how fast, and in how much memory.

    python -m bench.gpu_suite              starts no part after 470 seconds
    python -m bench.gpu_suite --dry-run    every section on tiny shapes, no GPU needed

First every public op against fp64 (`gpu_checks`), then forward + backward of `linear_divergence`
and of the peers at Qwen's shapes, and a draw of the sampler: median, 10th and 90th percentile of
the time between CUDA events, warm, with the L2 cache flushed before each run, and the peak of
memory beyond what was there. Appends JSON lines to bench/results/gpu_<name of the GPU>.jsonl.
A part that fails is recorded and the rest goes on. Exit status: 0; 1 where a check failed; 2
without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.floor import bare_gemms
from bench.gpu_checks import Size, checks
from bench.measure import MIB, extra_bytes
from bench.peers import Operands, make_operands, ours, peers
from esr_kernels import SampleKeys, sample_from_hidden

RESULTS = Path(__file__).parent / "results"
QWEN_CLASSES = 151_936
QWEN_DIMS = ((1536, 3584), (1024, 2560))
QWEN_TOKENS = (1600, 6400, 8192)
_SECONDS_A_CONTENDER = 1.5
_MOST_RUNS = 50
# No part is started after this, so that a rented GPU is given back in time.
_DEADLINE_SECONDS = 470
_FLUSH_BYTES = 256 * MIB  # more than any L2

Record = dict[str, Any]
Part = tuple[str, Callable[[], Record]]


def machine() -> Record:
    """What a figure means nothing without."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def seconds_of(run: Callable[[], object], budget: float) -> list[float]:
    """Seconds of each of up to `_MOST_RUNS` warm runs, at least 3, about `budget` in all."""
    on_gpu = torch.cuda.is_available()
    for _ in range(3 if on_gpu else 1):
        run()
    flush = torch.empty(_FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=_device())
    measured: list[float] = []
    began = time.perf_counter()
    while len(measured) < 3 or (
        len(measured) < _MOST_RUNS and time.perf_counter() - began < budget
    ):
        flush.zero_()
        if not on_gpu:
            start = time.perf_counter()
            run()
            measured.append(time.perf_counter() - start)
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        measured.append(events[0].elapsed_time(events[1]) / 1e3)
    return measured


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(run: Callable[[], object], budget: float, returned_bytes: int = 0) -> Record:
    """Milliseconds, and MiB at the peak beyond inputs and what is returned."""
    times = sorted(seconds_of(run, budget))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    peak = extra_bytes(run)
    return {
        "ms": 1e3 * statistics.median(times),
        "ms p10": 1e3 * deciles[0],
        "ms p90": 1e3 * deciles[-1],
        "runs": len(times),
        "extra MiB": None if peak is None else (peak - returned_bytes) / MIB,
    }


def _step(make: Callable[[], Callable[[Operands], object]], x: Operands, budget: float) -> Record:
    contender = make()

    def run() -> None:
        x.clear()
        contender(x)

    gradients = [x.student_hidden, x.student_weight]
    returned = sum(g.numel() * g.element_size() for g in gradients if g.requires_grad)
    record = timed(run, budget, returned)
    x.clear()
    return record


def timings(problems: list[dict[str, Any]], budget: float, compiles: bool) -> Iterator[Part]:
    """Forward + backward of all contenders on each problem, and the bare GEMMs."""
    contenders: dict[str, Callable[[], Callable[[Operands], object]]] = {
        "ours": lambda: ours("auto"),
        "ours, stash": lambda: ours("stash"),
        "ours, recompute": lambda: ours("recompute"),
        **peers(gpu=True),
    }
    if not compiles:
        del contenders["torch.compile"]
    for problem in problems:
        x = make_operands(**problem, device=_device())
        head = "trainable" if problem["train_head"] else "frozen"
        what = (
            f"T={problem['tokens']} Ds={problem['student_dim']} Dt={problem['teacher_dim']} "
            f"V={problem['classes']} beta={problem['beta']} {head} head"
        )
        run, products = bare_gemms(x, "stash")
        yield f"{what}: bare GEMMs ({products})", partial(timed, run, budget)
        for name, make in contenders.items():
            yield f"{what}: {name}", partial(_step, make, x, budget)


def draws(rows: list[int], dim: int, classes: int, budget: float) -> Iterator[Part]:
    """One sampled token a row from hidden states, against the plain way."""
    for count in rows:
        x = make_operands(count, dim, 16, classes, dtype=torch.bfloat16, device=_device())
        hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
        keys = SampleKeys(0, torch.arange(count, device=_device()), 0)
        what = f"draw, B={count} D={dim} V={classes}"

        def sample(h=hidden, w=weight, k=keys) -> object:
            return sample_from_hidden(h, w, k)

        def plain(h=hidden, w=weight) -> object:
            return (h @ w.T).float().softmax(-1).multinomial(1)

        yield f"{what}: ours", partial(timed, sample, budget)
        yield f"{what}: softmax and multinomial", partial(timed, plain, budget)


def parts(dry: bool) -> Iterator[tuple[str, Part]]:
    """(section, part) in order of importance. Dry, kernels run where the environment lets them."""
    problem = {"beta": 1.0, "dtype": torch.bfloat16, "train_head": True}
    if dry:
        impl = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
        size = Size("cpu", impl, 23, 1003, (24, 40), (torch.float32, torch.bfloat16))
        problem.update(tokens=8, student_dim=16, teacher_dim=32, classes=203)
        problems, rows, dim, classes, budget = [problem], [2], 16, 203, 0.0
    else:
        size = Size("cuda", "triton", 256, QWEN_CLASSES, QWEN_DIMS[0])
        problems = [
            {**problem, "tokens": t, "student_dim": s, "teacher_dim": d, "classes": QWEN_CLASSES}
            for s, d in QWEN_DIMS
            for t in QWEN_TOKENS
        ]
        for change in ({"train_head": False}, {"beta": 0.0}, {"beta": 0.5}):
            problems.append({**problems[1], **change})
        rows, dim, classes, budget = [1, 64, 256], 1536, QWEN_CLASSES, _SECONDS_A_CONTENDER
    for part in checks(size):
        yield "check", part
    for part in timings(problems, budget, compiles=not dry):
        yield "time", part
    for part in draws(rows, dim, classes, budget):
        yield "time", part


def measure(section: str, name: str, part: Callable[[], Record]) -> Record:
    """The record of a part, which names its error where it fails."""
    began = time.perf_counter()
    try:
        record = part()
    except ImportError as error:
        record = {"not installed": str(error)}
    except Exception as error:  # one part's out-of-memory or miscompile is a result too
        record = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"section": section, "name": name, **record, "took": time.perf_counter() - began}


def failed(record: Record) -> bool:
    """Whether a record says that an op is wrong. A slow or missing peer is not wrong."""
    return record["section"] == "check" and not record.get("ok", False)


def _line(record: Record) -> str:
    values = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in record.items()
        if key not in ("section", "name", "ok", "took")
    ]
    verdict = "FAILED " if failed(record) else ""
    return f"{record['name']:<72}{verdict}{', '.join(values)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--out", type=Path, help="JSON lines; default bench/results/gpu_<name>")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_suite needs a CUDA device and finds none; --dry-run runs it on tiny shapes")
        return 2
    where = machine()
    name = re.sub(r"[^a-z0-9]+", "_", (where["gpu"] or "none").lower()).strip("_")
    out = options.out or (None if options.dry_run else RESULTS / f"gpu_{name}.jsonl")
    began, wrong, skipped = time.perf_counter(), 0, 0
    for section, (title, part) in parts(options.dry_run):
        if time.perf_counter() - began > _DEADLINE_SECONDS:
            skipped += 1
            record: Record = {"section": section, "name": title, "error": "skipped: out of time"}
        else:
            record = measure(section, title, part)
        wrong += failed(record)
        print(_line(record), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps({**record, **where}) + "\n")
    print(f"{wrong} checks failed, {skipped} parts skipped, results in {out or 'no file'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
