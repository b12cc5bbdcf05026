"""What a loss costs, forward and backward: seconds, memory and value, of contenders in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bench.measure import MIB, extra_bytes, interleaved, median_ratio
from bench.peers import Contender, Operands, make_operands
from esr_kernels import release_workspace

_SAME_LOSS = 1e-4  # relative, in fp32


class Costs(NamedTuple):
    """Of each contender, and seconds of the floors too."""

    seconds: dict[str, list[float]]  # a round each
    extra_mib: dict[str, float | None]  # beyond inputs and gradients; None where not known
    losses: dict[str, float]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Of the seconds, median over rounds."""
        return median_ratio(self.seconds, name, base)

    def check_losses(self, base: str, others: Mapping[str, object]) -> None:
        """Raise unless the losses are those of `base`, but for `others`, which compute another."""
        for name, loss in self.losses.items():
            expected = self.losses[base]
            if name not in others and abs(loss - expected) > _SAME_LOSS * abs(expected):
                raise RuntimeError(f"{name}: loss {loss}, of {base} {expected}")


def loss_costs(
    x: Operands,
    contenders: Mapping[str, Contender],
    rounds: int,
    floors: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Measured in rounds in which all take their turns. Memory is that of a call before them."""
    gradients = sum(
        tensor.numel() * tensor.element_size()
        for tensor in (x.student_hidden, x.student_weight)
        if tensor.requires_grad
    )
    losses: dict[str, float] = {}

    def bind(name: str, contender: Contender) -> Callable[[], None]:
        def run() -> None:
            x.clear()
            losses[name] = float(contender(x))

        return run

    runs: dict[str, Callable[[], object]] = {
        name: bind(name, contender) for name, contender in contenders.items()
    }
    # A first call loads libraries and starts threads, or compiles for this size: no cost of it.
    dims = x.student_hidden.shape[1], x.teacher_hidden.shape[1]
    train_head = x.student_weight.requires_grad
    small = make_operands(8, *dims, 512, beta=x.beta, train_head=train_head)
    for name, contender in contenders.items():
        contender(x if "compile" in name else small)
    extra_mib: dict[str, float | None] = {}
    for name, run in runs.items():
        x.clear()
        release_workspace()
        extra = extra_bytes(run)
        extra_mib[name] = None if extra is None else (extra - gradients) / MIB
    runs |= floors or {}
    for floor in floors or {}:
        runs[floor]()
    return Costs(interleaved(runs, rounds, warm=False, clock=clock), extra_mib, losses)
