"""Tiny calls whose time is the host's: ours and plain PyTorch's, on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from bench.gpu_timing import Part, Record, device
from esr_kernels import SampleKeys, SamplingParams, linear_divergence, sample_from_hidden

TOKENS, CLASSES, DIM = 8, 64, 16
ROUNDS, _CALLS = 40, 25

Pair = tuple[Callable[[], object], Callable[[], object]]


def microseconds(
    calls: Sequence[Callable[[], object]], clock: Callable[[], float] = time.thread_time
) -> tuple[float, ...]:
    """Medians of the thread's own time in each call; they take turns, on a busy machine too.

    On a GPU, whose queue is empty before each round, the time until a call returns.
    """
    times: list[list[float]] = [[] for _ in calls]
    for number in range(1 + ROUNDS):
        for call, taken in zip(calls, times, strict=True):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = clock()
            for _ in range(_CALLS):
                call()
            if number:
                taken.append((clock() - start) / _CALLS)
    return tuple(1e6 * statistics.median(taken) for taken in times)


def divergence(impl: str, where: str) -> Pair:
    """(ours, plain PyTorch): reverse KL, forward and backward, with a trained head."""
    x, w = (torch.randn(n, DIM, device=where, requires_grad=True) for n in (TOKENS, CLASSES))
    teacher, head = (torch.randn(n, DIM, device=where) for n in (TOKENS, CLASSES))

    def ours() -> None:
        x.grad = w.grad = None
        linear_divergence(x, w, teacher, head, impl=impl).loss.backward()

    def plain() -> None:
        x.grad = w.grad = None
        log_p = torch.log_softmax((x @ w.T).float(), 1)
        log_q = torch.log_softmax((teacher @ head.T).float(), 1)
        (log_p.exp() * (log_p - log_q)).sum(1).sum().backward()

    return ours, plain


def draw(impl: str, where: str) -> Pair:
    """(ours, plain PyTorch): a token a row at a temperature."""
    hidden, weight = (torch.randn(n, DIM, device=where) for n in (TOKENS, CLASSES))
    step = torch.zeros(TOKENS, dtype=torch.int64, device=where)
    keys = SampleKeys(0, torch.arange(TOKENS, device=where), step)
    params = SamplingParams(0.7)

    def ours() -> None:
        sample_from_hidden(hidden, weight, keys, params, impl=impl)

    def plain() -> None:
        torch.multinomial(torch.softmax((hidden @ weight.T).float() / 0.7, 1), 1)

    return ours, plain


CALLS: dict[str, Callable[[str, str], Pair]] = {
    "linear_divergence, forward and backward": divergence,
    "sample_from_hidden": draw,
}


def host_times() -> Iterator[Part]:
    """(name, part) for `gpu_suite`: the host's time for each call where the suite runs."""
    for name, make in CALLS.items():
        yield f"host, tiny: {name}", partial(_host, make)


def _host(make: Callable[[str, str], Pair]) -> Record:
    ours, plain = microseconds(make("auto", device()), time.perf_counter)
    return {"us": ours, "plain us": plain, "ratio": ours / plain}
