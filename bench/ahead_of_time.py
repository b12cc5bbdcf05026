"""Triton launches that compile instead of running: for any GPU, with none present."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _AheadOfTime:
    """As much of a Triton driver as compiling takes."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # Kernels are cached by device.
        return f"{self._target.backend}:{self._target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass(frozen=True)
class Launched:
    """A launch that was compiled: the jitted function, what it became, and what it was given."""

    function: JITFunction
    kernel: Any
    programs: int
    tensor_bytes: int  # of its tensor arguments, those in tuples and of descriptors included

    @property
    def constants(self) -> dict[str, Any]:
        """Its compile-time arguments by name; those inside of tuples are left out."""
        names = self.function.arg_names
        return {names[at[0]]: x for at, x in self.kernel.src.constants.items() if len(at) == 1}


@contextmanager
def launches_compile(
    target: GPUTarget, into: list[Launched] | None = None
) -> Iterator[list[Launched]]:
    """Every kernel launched inside is compiled and appended to the list, a new one or `into`."""
    launched: list[Launched] = [] if into is None else into
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):  # type: ignore[no-untyped-def]
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        given = _tensors((*args, *kwargs.values()))
        size = sum(tensor.numel() * tensor.element_size() for tensor in given)
        launched.append(Launched(self, kernel, math.prod(grid), size))
        return kernel

    driver.set_active(_AheadOfTime(target))
    JITFunction.run = compile_only
    try:
        yield launched
    finally:
        JITFunction.run = run


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from _tensors(argument)
