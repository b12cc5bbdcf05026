"""CUDA graphs of decoding steps: captured once a shape, and replayed from rollout to rollout.

`StepGraphs` decides which step runs as it is, which is captured and which is replayed, and runs on
any device. `CudaRecorder`, a few lines, captures. A captured step reads and writes the addresses
that it was captured with, so it stays valid while weights and buffers are changed in place;
`weights_state` tells when weights were replaced.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import nn

logger = logging.getLogger(__name__)
Step = Callable[[], None]
# The sizes of a batch of a thousand rows, twice. A graph takes a few MiB.
_MOST_GRAPHS = 40
# Runs before a capture, so that kernels are compiled and workspaces allocated outside of it.
_WARM_UPS = 2


class Recorder(Protocol):
    def warm_up(self, step: Step) -> None:
        """Run the step where it will be captured."""

    def record(self, step: Step) -> Step:
        """Capture the step without running it; the result replays it. RuntimeError if it cannot."""


class StepGraphs:
    """Runs steps whose inputs and outputs are tensors that exist before, and stay.

    The first two calls of a key run its step, the third captures it, and all from then on replay
    it. The keys used longest ago go first. Without a recorder every call runs its step.
    """

    def __init__(self, recorder: Recorder | None, weights: Hashable = None) -> None:
        self.recorder = recorder
        self.weights = weights  # `weights_state` of the model whose steps these are
        self._calls: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, Step] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        self._calls.clear()
        self._graphs.clear()

    def forget(self, matches: Callable[[Any], bool]) -> None:
        """Drop the graphs of the keys that match: their buffers go."""
        for kept in (self._calls, self._graphs):
            for key in [key for key in kept if matches(key)]:
                del kept[key]

    def run(self, key: Hashable, step: Step) -> None:
        if self.recorder is None:
            return step()
        graph = self._graphs.get(key)
        if graph is None:
            calls = self._calls[key] = self._calls.get(key, 0) + 1
            if calls <= _WARM_UPS:
                return self.recorder.warm_up(step)
            try:
                graph = self.recorder.record(step)
            except RuntimeError as error:  # the model reads a tensor on the host, for example
                logger.warning("decoding without CUDA graphs from now on: %s", error)
                self.recorder = None
                self.clear()
                return step()
            self._graphs[key] = graph
            while len(self._graphs) > _MOST_GRAPHS:
                oldest, _ = self._graphs.popitem(last=False)
                self._calls.pop(oldest, None)
        self._graphs.move_to_end(key)
        return graph()


class CudaRecorder:
    """Captures on one stream of its own, into one pool: graphs that are replayed in turn, and hand
    nothing to each other in memory of the pool, may share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for all: cuBLAS keeps a workspace for each stream that it has seen.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step()
        current.wait_stream(self.stream)

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator = torch.cuda.default_generators[index]
        random_state = generator.clone_state()
        torch.cuda.synchronize(self.device)
        # The context restores the caller's stream whatever happens inside.
        with torch.cuda.stream(self.stream):
            # Other threads may allocate meanwhile: their calls are not part of the capture.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                step()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, index)
                generator.graphsafe_set_state(random_state)
                raise
        return graph.replay

    def _abandon(self, graph: Any, device: int) -> None:
        """End a failed capture on the stream and in the allocator.

        PyTorch before 2.11 leaves the allocator capturing if the end of the capture fails, which
        aborts the process later; before 2.13 the little memory in the pool stays reserved.
        """
        for end in (
            graph.capture_end,
            lambda: torch._C._cuda_endAllocateToPool(device, self.pool),  # type: ignore[attr-defined,unused-ignore]
            graph.reset,
        ):
            try:
                end()
            except RuntimeError:  # ended before
                pass


def weights_state(model: nn.Module) -> Hashable:
    """What a captured step depends on beside numbers in memory: where all weights and buffers are,
    of which type, and which adapters take part.

    Equal before and after an update in place; another one after weights were replaced, cast or
    moved, or after adapters were merged, switched or scaled.
    """
    tensors = tuple(
        (name, tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for found in (model.named_parameters(), model.named_buffers())
        for name, tensor in found
    )
    adapters = tuple(
        (name, *(str(getattr(module, part, None)) for part in _ADAPTER_STATE))
        for name, module in model.named_modules()
        if hasattr(module, "disable_adapters")
    )
    return tensors, adapters


# Of peft's layers.
_ADAPTER_STATE = ("merged", "disable_adapters", "active_adapters", "scaling")
