"""Models of which each process has a part (FSDP2), and a frozen teacher that is one of them.

A layer is gathered when a forward pass comes to it, and is in parts again after it. A model that
writes text, in which a pass is a single token, is gathered once for all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from esr_train.distributed import Ranks
from esr_train.models import decoder
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.teacher import Sequences, Teacher


class Sharded:
    """A model in parts: each layer, and as `root` all that is below none. What is given to `root`
    is called inside of its forward, where the embedding, the last norm and the head are whole."""

    def __init__(self, model: Any, policy: MixedPrecisionPolicy | None = None) -> None:
        self.model = model
        policy = policy or MixedPrecisionPolicy()
        below: Any = decoder(model)
        self.layers = [fully_shard(layer, mp_policy=policy) for layer in below.layers]
        self.root: Any = _Root(model)
        fully_shard(self.root, mp_policy=policy)
        self._kept: set[FSDPModule] = set()
        with torch.no_grad():
            self.root(lambda: None)  # the first module that runs is taken for the outermost
        for module in self.modules:
            module.reshard()

    @property
    def modules(self) -> list[FSDPModule]:
        return [self.root, *self.layers]

    @contextlib.contextmanager
    def gathered(self, modules: list[FSDPModule]) -> Iterator[None]:
        """Inside, this process has these whole, before and after passes; entered by all."""
        found = [module for module in modules if module not in self._kept]
        self._kept.update(found)
        try:
            for module in found:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for module in found:
                module.reshard()
                module.set_reshard_after_forward(module is not self.root, recurse=False)
            self._kept.difference_update(found)


class _Root(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class PartRanks(Ranks):
    """This process among several, each of which has a part of a model, such as the teacher."""

    lockstep = True  # each pass gathers layers, which takes all processes

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[Sharded] = []
        self.teacher: Sharded | None = None

    def whole(self, model: Any) -> contextlib.AbstractContextManager[None]:
        for sharded in self.parts:
            if sharded.model is model:
                return sharded.gathered(sharded.modules)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def scoring(self) -> Iterator[None]:
        if self.teacher is None:
            yield
            return
        root = self.teacher.root
        with self.teacher.gathered([root]):
            yield
        if hasattr(root, "reset_iter_state"):  # not before PyTorch 2.13
            root.reset_iter_state()  # forgets passes, of which FSDP keeps a list up to a backward

    def generate(self, rollout: PrefixRollout, *what: Any, **how: Any) -> RolloutBatch:
        with self.whole(rollout.model):
            return super().generate(rollout, *what, **how)


class ShardedTeacher(Teacher):
    """A teacher in parts: all processes make the same passes. `head` is whole in `scoring`."""

    def __init__(self, rollout: PrefixRollout, sharded: Sharded) -> None:
        super().__init__(rollout)
        self._sharded = sharded

    @torch.no_grad()
    def hidden_rows(self, batch: Sequences) -> Tensor:
        # Layers outside of the root's forward would gather their weights one after another, each
        # when the one before has been computed.
        read = super().hidden_rows
        found: Tensor = self._sharded.root(lambda: read(batch))
        return found


def sharded_teacher(world: Any, model: Any, make: Callable[[], PrefixRollout]) -> ShardedTeacher:
    """A model as the teacher of `world`, PartRanks; `make` makes its rollout, which runs it."""
    world.teacher = sharded = Sharded(model.requires_grad_(False))
    world.parts.append(sharded)
    with torch.no_grad(), sharded.gathered([sharded.root]):
        return ShardedTeacher(sharded.root(make), sharded)
