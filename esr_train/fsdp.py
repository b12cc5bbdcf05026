"""A run on several processes, each with a part of the student and its optimizer state: FSDP2.

The loss is computed inside of the forward of the outermost module, where the output head is whole.
FSDP sums the gradients here, and does not average them: token weights have the denominator of the
whole batch in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from esr_train import adapters, checkpoint
from esr_train.optim import MASTER, Optimizer
from esr_train.sharded import PartRanks, Sharded


class ShardedRanks(PartRanks):
    """This process among several, of which each has a part of the student once `resume` has been
    called."""

    saves_alone = False

    def __init__(self) -> None:
        super().__init__()
        self._student: Sharded | None = None
        self._stored_dtype = torch.float32

    def renewed(self) -> ShardedRanks:
        return self if self._student is None else ShardedRanks()

    def forward(self, function: Callable[[], Any]) -> Any:
        return function() if self._student is None else self._student.root(function)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        if self._student is None:
            super().sum_gradients(parameters)  # else the backward has done it

    def resume(self, directory: Path, model: Any, optimizer: Optimizer) -> dict[str, Any] | None:
        """Restores the whole student in the main process, then makes parts of it."""
        stored: Any = _Stored()
        state = self.from_main(lambda: checkpoint.resume(directory, model, stored))
        trained, trainable = dict(model.named_parameters()), list(optimizer.parameters)
        self._stored_dtype = trained[trainable[0]].dtype
        optimizer.close()
        for name in trainable:
            parameter = trained[name]
            parameter.data = parameter.data.float()
            if self.main and MASTER + name in stored.tensors:
                parameter.data.copy_(stored.tensors[MASTER + name])
            dist.broadcast(parameter.data, src=0)
        self._shard(model)
        optimizer.restart(model)
        names = self.from_main(lambda: [n for n in stored.tensors if not n.startswith(MASTER)])
        optimizer.load_state_tensors({n: self._part(n, stored, optimizer) for n in names})
        return state

    def save(
        self,
        directory: Path,
        state: dict[str, Any],
        model: Any,
        tokenizer: Any,
        optimizer: Optimizer,
        keep: int,
    ) -> None:
        """The files of one process: the main process collects the parts, one tensor at a time."""
        stored: Any = _Stored()
        weights = self._weights(model)
        stored.tensors = self._collected(optimizer.state_tensors())
        if self._stored_dtype != torch.float32:
            masters = {MASTER + name: p for name, p in optimizer.masters.items()}
            stored.tensors |= self._collected(masters)
        files = directory, state, model, tokenizer, stored, keep, weights
        self.from_main(lambda: checkpoint.save(*files))

    def save_best(self, directory: Path, step: int, model: Any, tokenizer: Any) -> None:
        weights = self._weights(model)
        self.from_main(lambda: checkpoint.save_best(directory, step, model, tokenizer, weights))

    def _shard(self, model: Any) -> None:
        policy = MixedPrecisionPolicy()
        if not adapters.is_adapted(model) and self._stored_dtype != torch.float32:
            policy = MixedPrecisionPolicy(self._stored_dtype, reduce_dtype=torch.float32)
        self._student = student = Sharded(model, policy)
        self.parts.append(student)
        # FSDP would gather ahead in the backward what ran before a layer: for the first one the end
        # of this process's rollout, which others may not have had, and wait for them for ever.
        before = student.modules
        for module, prefetched in zip(before, [before[-1], *before], strict=False):
            module.set_modules_to_backward_prefetch([prefetched])
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other

    def _part(self, name: str, stored: Any, optimizer: Optimizer) -> Tensor:
        """This process's part of a tensor of AdamW's state, which the main process has."""
        like = self.from_main(lambda: (stored.tensors[name].shape, stored.tensors[name].dtype))
        parameter = optimizer.masters[name.split("/", 2)[2]]
        device = parameter.device if like[0] else torch.device("cpu")
        tensor = torch.empty(like[0], dtype=like[1], device=device)
        if self.main:
            tensor.copy_(stored.tensors[name])
        if like[0] and isinstance(parameter, DTensor):
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        dist.broadcast(tensor, src=0)
        return tensor

    def _weights(self, model: Any) -> dict[str, Tensor]:
        """What the files of a model have, by their names in it: of an adapted one the adapter."""
        adapted = adapters.is_adapted(model)
        found = {n: p for n, p in model.named_parameters() if p.requires_grad or not adapted}
        for prefix, module in model.named_modules():
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                    found[name] = buffer
        return self._collected(found, self._stored_dtype)

    def _collected(
        self, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the main process; nothing in the others."""
        found = {}
        for name, tensor in tensors.items():
            full = tensor.detach()
            if isinstance(full, DTensor):
                full = full.full_tensor()
            if self.main:
                cast = dtype is not None and full.is_floating_point()
                found[name] = full.to("cpu", dtype if cast else None)
        return found


class _Stored:
    """Stands in for an `Optimizer` whose tensors are in a checkpoint."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def state_tensors(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
