"""The processes of a run: this one alone, or several under torchrun or `accelerate launch`.

`World` is for one process: its methods do nothing but the work. `distributed.py` and `fsdp.py` have
those of several; `launch.py` chooses.
"""

from __future__ import annotations

import contextlib
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
    # Whether all processes must make the same number of passes through a model.
    lockstep = False
    # Whether the main process can save at any moment, without the others.
    saves_alone = True

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

    def whole(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, this process has all weights of a model, to run any part of it without gradients;
        entered by all processes."""
        return contextlib.nullcontext()

    def scoring(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this process has the teacher's head whole; entered by all processes."""
        return contextlib.nullcontext()

    def forward(self, function: Callable[[], _T]) -> _T:
        """`function()`, a pass through the student with its loss; the backward comes after."""
        return function()

    def from_main(self, make: Callable[[], _T]) -> _T:
        """What `make` returns in the main process, which alone calls it."""
        return make()

    def resume(self, directory: Path, model: Any, optimizer: Optimizer) -> dict[str, Any] | None:
        """`checkpoint.resume`, the same in every process."""
        return checkpoint.resume(directory, model, optimizer)

    def save(
        self,
        directory: Path,
        state: dict[str, Any],
        model: Any,
        tokenizer: Any,
        optimizer: Optimizer,
        keep: int,
    ) -> None:
        """`checkpoint.save` in the main process."""
        if self.main:
            checkpoint.save(directory, state, model, tokenizer, optimizer, keep)

    def save_best(self, directory: Path, step: int, model: Any, tokenizer: Any) -> None:
        """`checkpoint.save_best` in the main process."""
        if self.main:
            checkpoint.save_best(directory, step, model, tokenizer)

    def log(self, path: Path, step: int) -> JsonLines:
        """A log of rows up to `step`, which the main process writes."""
        return JsonLines(path, step)

    def renewed(self) -> World:
        """The same processes for another run: this world, unless its run has left a student in
        parts, who cannot start again."""
        return self

    def __enter__(self) -> World:
        return self

    def __exit__(self, *how: Any) -> None:
        """Leave the others; in what they then wait for they learn of it."""


ONE = World()
