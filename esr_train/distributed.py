"""A run on several processes, each with the whole student: the work of a step is shared.

Every process samples the answers to its prompts, and all exchange them, so that each knows the
whole batch of the step: weights of tokens, denominators and metrics are those of one process. Each
then computes the gradient of its share of the responses, and the gradients are summed. Noise is
keyed by the response, so that the same responses are sampled whatever the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from esr_train import checkpoint
from esr_train.metrics import JsonLines
from esr_train.optim import Optimizer
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.rollout.batch import joined
from esr_train.world import World, WorldError

_T = TypeVar("_T")
# How long a process waits for another one that neither answers nor ends.
_TIMEOUT = timedelta(minutes=float(os.environ.get("ESR_TIMEOUT_MINUTES", "30")))


class Ranks(World):
    """This process among those that a launcher has started: RANK, WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT are in the environment."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if not dist.is_initialized():
            dist.init_process_group(backend, timeout=_TIMEOUT)
        # For what is on the CPU: responses, and what the main process has read.
        self._host = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def generate(
        self,
        rollout: PrefixRollout,
        prompts: list[list[int]],
        samples: int,
        *what: Any,
        row_keys: Tensor | None = None,
        **how: Any,
    ) -> RolloutBatch:
        """Prompt i is that of process i modulo the number of processes."""
        keys = torch.arange(len(prompts) * samples) if row_keys is None else row_keys
        rows = keys.new_tensor(range(len(keys)))
        of_rank = [rows[rows // samples % self.size == rank] for rank in range(self.size)]
        mine = of_rank[self.rank]

        def own(value: Any) -> Any:
            """What is given for each response, of this process's ones."""
            each = isinstance(value, Tensor) and value.shape == (len(keys),)
            return value[mine.to(value.device)] if each else value

        batch = None
        if len(mine):
            batch = rollout.generate(
                prompts[self.rank :: self.size],
                samples,
                *map(own, what),
                row_keys=keys[mine],
                **{name: own(value) for name, value in how.items()},
            )
        batches: list[Any] = [None] * self.size
        dist.all_gather_object(batches, batch, group=self._host)
        place = torch.cat(of_rank).argsort()
        return joined([found for found in batches if found is not None]).select(place)

    def total(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        # A parameter without a gradient in any process must stay so: AdamW leaves it as it is.
        found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        sums = []
        for parameter, anywhere in zip(parameters, found.tolist(), strict=True):
            if not anywhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in sums:
            work.wait()

    def from_main(self, make: Callable[[], _T]) -> _T:
        """If `make` raises, so does this, in the others a WorldError with the message."""
        sent: list[Any] = [None, None]
        if self.main:
            try:
                sent = [make(), None]
            except Exception as error:
                dist.broadcast_object_list([None, f"{error}"], src=0, group=self._host)
                raise
        dist.broadcast_object_list(sent, src=0, group=self._host)
        value, failure = sent
        if failure is not None:
            raise WorldError(f"rank 0: {failure}")
        return value  # type: ignore[no-any-return]

    def resume(self, directory: Path, model: Any, optimizer: Optimizer) -> dict[str, Any] | None:
        """The main process reads the checkpoint, and sends it to the others, which need not see its
        disk. Without one it sends the initial weights."""
        state = self.from_main(lambda: checkpoint.resume(directory, model, optimizer))
        for name, parameter in optimizer.parameters.items():
            dist.broadcast(parameter.data, src=0)
            if optimizer.masters[name] is not parameter:
                dist.broadcast(optimizer.masters[name], src=0)
        if state is None:
            return None
        own = optimizer.state_tensors()
        like = {name: (t.shape, t.dtype, t.device.type) for name, t in own.items()}
        tensors = {}
        for name, (shape, dtype, device) in self.from_main(lambda: like).items():
            tensor = own[name] if self.main else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(tensor, src=0)
            tensors[name] = tensor
        if not self.main:
            optimizer.load_state_tensors(tensors)
        return state

    def log(self, path: Path, step: int) -> JsonLines:
        log: Any = JsonLines(path, step) if self.main else _Unwritten()
        log.steps = self.from_main(lambda: log.steps)
        return log  # type: ignore[no-any-return]

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        lost = ("onnection", "gloo", "NCCL", "imed out")
        if isinstance(error, RuntimeError) and any(word in str(error) for word in lost):
            raise WorldError(f"another process has ended or does not answer ({error})") from error
        if error is None:
            dist.destroy_process_group()


class _Unwritten:
    """A log that another process writes."""

    steps: set[int]

    def write(self, row: dict[str, Any]) -> None:
        self.steps.add(row["step"])

    def close(self) -> None:
        pass
