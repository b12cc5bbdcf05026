"""Where a call's time goes on a GPU, kernel by kernel: the calls that `bench.predict` predicts.

Terms have the predictor's names, so that each measured one has a predicted one beside it
(`bench.readme`, docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from bench.floor import bare_gemms
from bench.gpu_kernels import projections
from bench.gpu_timing import Part, Record, device, timed
from bench.peers import make_operands, ours
from esr_kernels import SampleKeys, linear_divergence, sample_from_hidden

_RUNS = 5
# Parts of the names of the vendor's products.
_PRODUCTS = ("gemm", "nvjet", "cutlass", "cublas", "splitk", "cijk")


@dataclass(frozen=True)
class Sizes:
    """(tokens, dims, head, trainable or frozen) of each divergence, and (rows, dim) of a draw."""

    divergences: tuple[tuple[int, tuple[int, int], str], ...]
    draw: tuple[int, int]
    classes: int
    seconds: float


QWEN = Sizes(
    ((8192, (1536, 3584), "trainable"), (6400, (1536, 2048), "frozen")), (64, 1536), 151_936, 0.5
)
TINY = Sizes(((8, (16, 32), "trainable"), (8, (16, 32), "frozen")), (2, 16), 203, 0.0)


def profiles(sizes: Sizes) -> Iterator[Part]:
    """(name of the predictor's call, part)."""
    for tokens, dims, head in sizes.divergences:
        x = make_operands(
            tokens,
            *dims,
            sizes.classes,
            train_head=head == "trainable",
            dtype=torch.bfloat16,
            device=device(),
        )
        what = f"T={tokens}, D={dims[0]}/{dims[1]}"
        stash = ours("auto")

        def step(x=x, stash=stash) -> None:
            x.clear()
            stash(x)

        def fused(x=x) -> None:
            with torch.no_grad():
                linear_divergence(
                    x.student_hidden,
                    x.student_weight,
                    x.teacher_hidden,
                    x.teacher_weight,
                    plan="fused" if device() == "cuda" else "auto",
                )

        products, _ = bare_gemms(x, "stash")
        yield f"products, {what}, {head} head", partial(timed, products, sizes.seconds)
        yield f"stash, {what}, {head} head", partial(_profile, step, sizes.seconds)
        yield f"products, {what}, projections", partial(timed, projections(x), sizes.seconds)
        yield f"fused statistics, {what}", partial(_profile, fused, sizes.seconds)
        x.clear()
    rows, dim = sizes.draw
    x = make_operands(rows, dim, 16, sizes.classes, dtype=torch.bfloat16, device=device())
    hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
    keys = SampleKeys(0, torch.arange(rows, device=device()), 0)
    draw = partial(sample_from_hidden, hidden, weight, keys)
    yield f"draw, B={rows}, D={dim}", partial(_profile, draw, sizes.seconds)


def _profile(run: Callable[[], object], seconds: float) -> Record:
    """Median milliseconds, and of each term the launches and milliseconds of a call."""
    record = timed(run, seconds)
    if not torch.cuda.is_available():
        return record
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(_RUNS):
            run()
        torch.cuda.synchronize()
    terms: dict[str, dict[str, float]] = {}
    names: dict[str, float] = {}
    for event in trace.key_averages():
        if not event.self_device_time_total:
            continue
        names[event.key[:80]] = event.self_device_time_total / 1e3 / _RUNS
        term = terms.setdefault(_term(event.key), {"launches": 0, "ms": 0.0})
        term["launches"] += event.count / _RUNS
        term["ms"] += event.self_device_time_total / 1e3 / _RUNS
    return {**record, "terms": terms, "kernels": names}


def _term(kernel: str) -> str:
    if kernel.startswith("_") and kernel.endswith("_kernel"):
        return kernel.lstrip("_")
    if any(part in kernel.lower() for part in _PRODUCTS):
        return "products"
    return "PyTorch's other kernels"
