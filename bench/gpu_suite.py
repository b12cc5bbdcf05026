"""One command for the day a GPU is at hand: is everything right, how fast, and in how much memory.

    python -m bench.gpu_suite              starts no part after 470 seconds
    python -m bench.gpu_suite --dry-run    every section on tiny shapes, no GPU needed
    python -m bench.gpu_suite --groups checks --share 1/4     a quarter of one group: four such
                                           processes side by side compile four times as fast

First every public op against fp64 (`gpu_checks`), then times at Qwen's shapes: forward + backward
of `linear_divergence` and of the peers, draws, single kernels (`gpu_kernels`), training steps and
rollouts of whole models (`gpu_models`). Median, 10th and 90th percentile between CUDA events, warm,
with the L2 cache flushed before each run, the peak of memory beyond what was there, clocks and
power. Measured rates are written where plans look for them (`esr_kernels.common.calibration`).
Appends JSON lines to bench/results/gpu_<name of the GPU>.jsonl. A part that fails is recorded and
the rest goes on. Exit status: 0; 1 where a check failed or no check was run (but where --groups
names times only); 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import gpu_kernels, gpu_models, gpu_profile, host_calls
from bench.floor import bare_gemms
from bench.gpu_checks import Size, checks, large_checks
from bench.gpu_timing import INTERPRETS, Clocks, Part, Record, device, timed
from bench.peers import Operands, make_operands, ours, peers
from esr_kernels import SampleKeys, sample_from_hidden
from esr_kernels.common.calibration import calibration_path, read

RESULTS = Path(__file__).parent / "results"
QWEN_CLASSES = 151_936
QWEN_DIMS = ((1536, 3584), (1024, 2560))
QWEN_TOKENS = (1600, 6400, 8192)
_TIGHT = 1536 << 20  # about what TRL's chunks take
_SECONDS_A_CONTENDER = 0.8


class Group(NamedTuple):
    """Parts that belong together, and the seconds for them; what they leave is the next group's.

    No part is started when the time of its group and those before is over, so that the important
    ones are measured and a rented GPU is given back: 470 seconds in all.
    """

    name: str
    seconds: float
    parts: Iterable[tuple[str, Part]]  # (section, part); the section is "check" or "time"


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


def results_path(where: Record) -> Path:
    """Where the records of a GPU are kept."""
    name = re.sub(r"[^a-z0-9]+", "_", (where["gpu"] or "none").lower()).strip("_")
    return RESULTS / f"gpu_{name}.jsonl"


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
        "ours, 1,536 MiB": lambda: ours("auto", _TIGHT),
        **peers(gpu=True),
    }
    if not compiles:
        del contenders["torch.compile"]
    for problem in problems:
        x = make_operands(**problem, device=device())
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
        x = make_operands(count, dim, 16, classes, dtype=torch.bfloat16, device=device())
        hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
        keys = SampleKeys(0, torch.arange(count, device=device()), 0)
        what = f"draw, B={count} D={dim} V={classes}"

        def sample(h=hidden, w=weight, k=keys) -> object:
            return sample_from_hidden(h, w, k)

        def plain(h=hidden, w=weight) -> object:
            return (h @ w.T).float().softmax(-1).multinomial(1)

        yield f"{what}: ours", partial(timed, sample, budget)
        yield f"{what}: softmax and multinomial", partial(timed, plain, budget)


def _both(section: str, parts: Iterable[Part]) -> Iterator[tuple[str, Part]]:
    for part in parts:
        yield section, part


def groups(dry: bool, calibration: Path | None) -> list[Group]:
    """Most important first. Dry, kernels run where the environment lets them."""
    problem = {"beta": 1.0, "dtype": torch.bfloat16, "train_head": True}
    if dry:
        impl = "triton" if INTERPRETS else "torch"
        size = Size("cpu", impl, 23, 1003, (24, 40), (torch.float32, torch.bfloat16))
        large = replace(size, tokens=150, classes=203)
        problem.update(tokens=8, student_dim=16, teacher_dim=32, classes=203)
        problems, rows, dim, classes, budget = [problem], [2], 16, 203, 0.0
        kernels = gpu_kernels.Sizes(impl, (8,), ((16, 32), (16, 64)), 203, (2, 3), 4, 2, 20, 6, 0.0)
        models, profiled = gpu_models.TINY, gpu_profile.TINY
    else:
        size = Size("cuda", "triton", 256, QWEN_CLASSES, QWEN_DIMS[0])
        large = replace(size, tokens=8192, dtypes=(torch.bfloat16,))
        problems = [
            {**problem, "tokens": t, "student_dim": s, "teacher_dim": d, "classes": QWEN_CLASSES}
            for s, d in QWEN_DIMS
            for t in QWEN_TOKENS
        ]
        for change in ({"train_head": False}, {"beta": 0.0}, {"beta": 0.5}):
            problems.append({**problems[1], **change})
        rows, dim, classes, budget = [1, 64, 256], 1536, QWEN_CLASSES, _SECONDS_A_CONTENDER
        kernels = gpu_kernels.QWEN
        models, profiled = gpu_models.QWEN, gpu_profile.QWEN
    found = [
        Group("checks", 100, _both("check", checks(size))),
        Group("checks at full size", 40, _both("check", large_checks(large))),
        Group("divergence", 90, _both("time", timings(problems[:2], budget, compiles=not dry))),
        Group("profiles", 20, _both("time", gpu_profile.profiles(profiled))),
        Group("host", 5, _both("time", host_calls.host_times())),
        Group("draws", 15, _both("time", draws(rows, dim, classes, budget))),
        Group("kernels", 25, _both("time", gpu_kernels.parts(kernels))),
        Group("calibration", 20, _both("time", gpu_kernels.calibrations(kernels, calibration))),
        Group("steps", 70, _both("time", gpu_models.steps(models))),
        Group("rollouts", 40, _both("time", gpu_models.rollouts(models))),
        Group("more divergence", 45, _both("time", timings(problems[2:], budget, not dry))),
    ]
    # A rehearsal is to reach every part, however slow the machine is.
    return [group._replace(seconds=math.inf) for group in found] if dry else found


def chosen(
    all_groups: list[Group], names: list[str] | None, share: tuple[int, int], seconds: float | None
) -> list[Group]:
    """The named groups, or all; of their parts the k-th of every n, share = (k, n), from 1; with
    `seconds` for all of them in proportion to what they have. Raises ValueError."""
    known = [group.name for group in all_groups]
    if names is not None:
        names = [name.strip() for name in names]
    for name in names or []:
        if name not in known:
            raise ValueError(f"--groups: {name!r} is none of {', '.join(known)}")
    kept = [group for group in all_groups if names is None or group.name in names]
    whole = sum(group.seconds for group in kept)
    of_time = 1.0 if seconds is None or math.isinf(whole) else seconds / whole
    k, n = share
    return [
        group._replace(seconds=group.seconds * of_time, parts=islice(group.parts, k - 1, None, n))
        for group in kept
    ]


def _share(text: str) -> tuple[int, int]:
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"must be K/N with 1 <= K <= N, got {text!r}")
    return int(k), int(n)


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return seconds


def started(all_groups: list[Group]) -> Iterator[tuple[str, str, Callable[[], Record] | None]]:
    """(section, name, part) of all groups; None for a part that is out of time.

    What fails where a group makes its operands is a part that fails, and ends its group.
    """
    began, allowed = time.perf_counter(), 0.0
    for group in all_groups:
        allowed += group.seconds
        parts = iter(group.parts)
        while True:
            if time.perf_counter() - began > allowed:
                yield "time", f"{group.name}: what is left of it", None
                break
            try:
                section, (name, part) = next(parts)
            except StopIteration:
                break
            except Exception as error:
                yield "time", f"{group.name}: operands", partial(_raise, error)
                break
            yield section, name, part


def _raise(error: Exception) -> Record:
    raise error


def measure(section: str, name: str, part: Callable[[], Record], clocks: Clocks) -> Record:
    """The record of a part, which names its error where it fails, with clocks and power."""
    began = time.perf_counter()
    try:
        record = part()
    except ImportError as error:
        record = {"not installed": str(error)}
    except Exception as error:  # one part's out-of-memory or miscompile is a result too
        record = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ended = time.perf_counter()
    during = clocks.during(began, ended)
    return {"section": section, "name": name, **record, **during, "took": ended - began}


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
    parser.add_argument(
        "--calibration", type=Path, help="file for the rates of plans; default: where plans look"
    )
    parser.add_argument("--groups", help="names of groups, separated by commas; default all")
    parser.add_argument(
        "--share", type=_share, default=(1, 1), help="K/N: of the parts of a group the K-th of N"
    )
    parser.add_argument(
        "--seconds", type=_positive, help="for what is chosen; default what its groups have, of 470"
    )
    options = parser.parse_args(arguments)
    where = machine()
    out = options.out or (None if options.dry_run else results_path(where))
    calibration = options.calibration
    if calibration is None and not options.dry_run:
        calibration = calibration_path()
    names = None if options.groups is None else options.groups.split(",")
    try:
        parts = chosen(groups(options.dry_run, calibration), names, options.share, options.seconds)
        if calibration is not None and calibration.exists():
            read(calibration)  # now, not when it is written
    except ValueError as error:
        parser.error(str(error))
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_suite needs a CUDA device and finds none; --dry-run runs it on tiny shapes")
        return 2
    try:
        if out is not None:
            out.open("a").close()
    except OSError as error:
        parser.error(f"--out: {error}")
    only_times = names is not None and not any("checks" in name for name in names)
    wrong, skipped, shown, ran, cut = 0, 0, 0, 0, False
    with Clocks() as clocks:
        for section, title, part in started(parts):
            if part is None:
                skipped += 1
                cut |= title.startswith("checks")
                record: Record = {"section": section, "name": title, "error": "out of time"}
            else:
                ran += 1
                record = measure(section, title, part, clocks)
            wrong += failed(record)
            shown += section == "check" and part is not None
            print(_line(record), flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps({**record, **where}) + "\n")
    if not ran or (not shown and not only_times):
        print("nothing was run" if not ran else "no check was run: nothing was shown to be right")
        return 1
    if cut:
        print(f"the time was over after {shown} checks: the others were not run")
    print(f"{wrong} checks failed, {skipped} groups out of time, results in {out or 'no file'}")
    return int(wrong > 0 or cut)


if __name__ == "__main__":
    sys.exit(main())
