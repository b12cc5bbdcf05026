"""Single kernels for `gpu_suite`: fused statistics, fused draws, attention; and the rates of plans.

Each fused kernel is timed beside the separate kernels that would take its place, and the floor of
both. From the same measurements follow the rates of `esr_kernels.common.calibration`: what a plan
is priced with on this GPU.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_timing import Part, Record, device, seconds_of, timed
from bench.measure import MIB
from bench.peers import Operands, make_operands
from esr_kernels import (
    SampleKeys,
    linear_divergence,
    plan_linear_divergence,
    sample_from_hidden,
    shared_prefix_attention,
)
from esr_kernels.common.calibration import COUNTED, Rates, write

_COPIED_BYTES = 1024 * MIB


@dataclass(frozen=True)
class Sizes:
    """What the kernels run on; the first of `dims` is narrow for a draw, the second wide."""

    impl: str
    tokens: tuple[int, ...]
    dims: tuple[tuple[int, int], ...]
    classes: int
    draw_rows: tuple[int, ...]
    prompts: int
    samples: int
    prompt_length: int
    length: int
    seconds: float  # for each measurement


QWEN = Sizes(
    "triton", (6400, 8192), ((1536, 3584), (4096, 5120)), 151_936, (32, 64, 128, 256), 64, 4, 256,
    100, 0.4,
)  # fmt: skip


def parts(sizes: Sizes) -> Iterator[Part]:
    """(name, part) of every kernel and of what it is instead of."""
    for tokens in sizes.tokens:
        x = _operands(tokens, sizes.dims[0], sizes.classes)
        what = f"statistics, T={tokens} D={sizes.dims[0]} V={sizes.classes}"
        for name, run in _statistics(x, sizes.impl).items():
            yield f"{what}: {name}", partial(timed, run, sizes.seconds)
    for rows in sizes.draw_rows:
        for name, run in _draws(rows, sizes.dims[0][0], sizes).items():
            yield f"draw, B={rows} D={sizes.dims[0][0]}: {name}", partial(timed, run, sizes.seconds)
    what = f"attention, {sizes.prompts} x {sizes.samples} rows over {sizes.prompt_length} + "
    for name, run in _attention(sizes).items():
        yield f"{what}{sizes.length} keys: {name}", partial(timed, run, sizes.seconds)


def _operands(tokens: int, dims: tuple[int, int], classes: int) -> Operands:
    return make_operands(tokens, *dims, classes, dtype=torch.bfloat16, device=device())


def _statistics(x: Operands, impl: str) -> dict[str, Callable[[], object]]:
    """The loss alone, from one kernel and from logits in memory, and the bare projections."""

    def by(plan: str) -> object:
        with torch.no_grad():
            return linear_divergence(
                x.student_hidden,
                x.student_weight,
                x.teacher_hidden,
                x.teacher_weight,
                plan=plan,
                impl=impl,
            )

    runs: dict[str, Callable[[], object]] = {"recompute": partial(by, "recompute")}
    if impl == "triton":  # the kernel has no other form
        runs["fused"] = partial(by, "fused")
    runs["bare projections"] = projections(x)
    return runs


def projections(x: Operands) -> Callable[[], object]:
    hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
    student, teacher = (
        torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        for _ in range(2)
    )

    def run() -> None:
        torch.mm(hidden, weight.T, out=student)
        torch.mm(x.teacher_hidden, x.teacher_weight.T, out=teacher)

    return run


def _draws(rows: int, dim: int, sizes: Sizes) -> dict[str, Callable[[], object]]:
    """A draw from hidden states in one kernel, and from logits in memory."""
    x = _operands(rows, (dim, 16), sizes.classes)
    hidden, weight = x.student_hidden.detach(), x.student_weight.detach()
    keys = SampleKeys(0, torch.arange(rows, device=device()), 0)

    def draw(fuses: bool) -> object:
        with _fusing(fuses):
            return sample_from_hidden(hidden, weight, keys, impl=sizes.impl)

    return {"fused": partial(draw, True), "from logits": partial(draw, False)}


@contextlib.contextmanager
def _fusing(fuses: bool) -> Iterator[None]:
    from esr_kernels.sampling import fused_triton

    with mock.patch.object(fused_triton, "is_faster", lambda *_: fuses):
        yield


def _attention(sizes: Sizes) -> dict[str, Callable[[], object]]:
    """A decoding step's attention, of the shape of Qwen2.5-1.5B, and PyTorch's over whole rows."""
    heads, key_heads, dim = 12, 2, 128
    rows = sizes.prompts * sizes.samples

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device()).bfloat16()

    def full(count: int, length: int) -> Tensor:
        return torch.full((count,), length, device=device())

    query = normal(rows, heads, dim)
    prefix = [normal(sizes.prompts, key_heads, sizes.prompt_length, dim) for _ in range(2)]
    suffix = [normal(rows, key_heads, sizes.length, dim) for _ in range(2)]
    lengths = full(sizes.prompts, sizes.prompt_length), full(rows, sizes.length)
    key, value = (
        torch.cat([a.repeat_interleave(sizes.samples, 0), b], 2)
        for a, b in zip(prefix, suffix, strict=True)
    )

    def ours() -> Tensor:
        return shared_prefix_attention(
            query, *prefix, lengths[0], *suffix, lengths[1], impl=sizes.impl
        )

    def whole() -> Tensor:
        return F.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)

    return {"ours": ours, "PyTorch's over whole rows": whole}


def calibrations(sizes: Sizes, path: Path | None) -> Iterator[Part]:
    """One part: measures the rates of plans, and writes them to `path` unless that is None."""
    yield "rates of plans", partial(_calibrate, sizes, path)


def _calibrate(sizes: Sizes, path: Path | None) -> Record:
    rates = _measured_rates(sizes)
    record: Record = {**asdict(rates), "written to": None if path is None else str(path)}
    if path is None:
        return record
    if torch.cuda.is_available():
        write(path, torch.cuda.get_device_name(), rates)
    else:  # a rehearsal: a CPU's rates on tiny shapes are none that a plan could have
        write(path, "none", COUNTED)
    return record


def _measured_rates(sizes: Sizes) -> Rates:
    """Rates of `cost`: bytes by a copy, FLOPs by bare projections, the rest by what is left."""

    def median(run: Callable[[], object]) -> float:
        return statistics.median(seconds_of(run, sizes.seconds)[0])

    on_gpu = torch.cuda.is_available()
    source = torch.zeros(_COPIED_BYTES if on_gpu else MIB, dtype=torch.uint8, device=device())
    copy = torch.empty_like(source)
    byte = median(partial(copy.copy_, source)) / (2 * source.numel())
    del source, copy
    tokens, products, fused = sizes.tokens[0], [], []
    for dims in sizes.dims:
        x = _operands(tokens, dims, sizes.classes)
        runs = _statistics(x, sizes.impl)
        flops = 2.0 * tokens * sizes.classes * sum(dims)
        products.append(flops / median(runs["bare projections"]))
        if "fused" in runs:
            plan = plan_linear_divergence(
                tokens,
                sizes.classes,
                *dims,
                device=device(),
                train_hidden=False,
                train_weight=False,
                plan="fused",
            )
            # What `cost` adds to the kernel's products and epilogue.
            fused.append((flops, median(runs["fused"]) / byte - plan.bytes_moved))
    rates = replace(COUNTED, flops_per_byte=statistics.mean(products) * byte)
    if fused:
        rate, epilogue = _fused_rates(fused, rates.flops_per_byte, tokens * sizes.classes)
        rates = replace(rates, fused_rate=rate, fused_epilogue=epilogue)
    narrow, wide = (_crossover(dims[0], sizes, median) for dims in sizes.dims)
    rates = replace(rates, draw_rows=narrow, draw_rows_wide=wide)
    return rates


def _fused_rates(
    measured: list[tuple[float, float]], flops_per_byte: float, pairs: int
) -> tuple[float, float]:
    """(rate, epilogue) of flops / (rate * flops_per_byte) + epilogue * pairs = time in bytes.

    Two equations. An epilogue below 0, of noise, is 0, and the rate then that of both together.
    """
    (few, short), (many, long) = sorted(measured)
    slope = (long - short) / (many - few)
    epilogue = (short - slope * few) / pairs
    if slope <= 0 or epilogue < 0:
        slope, epilogue = (short + long) / (few + many), 0.0
    return 1 / (slope * flops_per_byte), epilogue


def _crossover(dim: int, sizes: Sizes, median: Callable[[Callable[[], object]], float]) -> int:
    """The most rows, of those that are tried, for which the fused draw, which holds no logits, is
    not slower by a twentieth."""
    most = 0
    for rows in sizes.draw_rows:
        runs = _draws(rows, dim, sizes)
        if median(runs["fused"]) > 1.05 * median(runs["from logits"]):
            break
        most = rows
    return most
