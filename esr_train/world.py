"""The processes of a run: this one alone, or several under torchrun or `accelerate launch`.

`World` is for one process: its methods do nothing but the work. `esr_train.distributed` has those
of several, and is imported only by `start` and only there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from esr_train import checkpoint
from esr_train.metrics import JsonLines
from esr_train.optim import Optimizer
from esr_train.rollout import PrefixRollout, RolloutBatch

_T = TypeVar("_T")


class WorldError(RuntimeError):
    """Another process of the run has failed or ended; what it said itself says why."""


class World:
    """One process; as a context, what it is for ends with it."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def generate(self, rollout: PrefixRollout, *what: Any, **how: Any) -> RolloutBatch:
        """`rollout.generate(*what, **how)`: prompts are shared among the processes, and every one
        has all responses."""
        return rollout.generate(*what, **how)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return values

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make each gradient its sum over all processes."""

    def from_main(self, make: Callable[[], _T]) -> _T:
        """What `make` returns in the main process, which alone calls it."""
        return make()

    def resume(self, directory: Path, model: Any, optimizer: Optimizer) -> dict[str, Any] | None:
        """`checkpoint.resume`, the same in every process."""
        return checkpoint.resume(directory, model, optimizer)

    def log(self, path: Path, step: int) -> JsonLines:
        """A log of rows up to `step`, which the main process writes."""
        return JsonLines(path, step)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *how: Any) -> None:
        """Leave the others; in what they then wait for they learn of it."""


ONE = World()


def launched() -> int:
    """How many processes a launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def start() -> World:
    """This process's world, after it has found the others of its launcher."""
    if launched() == 1:
        return ONE
    from esr_train.distributed import Ranks  # Imports torch.distributed and opens connections.

    return Ranks()
