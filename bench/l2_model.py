"""Bytes that a kernel's grid draws from memory, by a cache that drops what was used longest ago.

    python -m bench.l2_model 8192 151936 1536 3584 132 sm_90 25e6

The order of the loads is not modelled but recorded: the kernel as it is runs in Triton's
interpreter, on its real grid, with tiles of fewer rows and with the products left out. Programs
that run at once go step by step together, as they do on a GPU within a little. Only the first
programs that fit the machine, and their first tiles, are run: after the first half of those the
traffic of a tile is steady.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

Unit = tuple[Hashable, int]  # what is loaded, and its bytes
_TILES = 6  # that each program is followed for
_SLABS = 8  # parts of the depth that a product walks
_SHRINK = 16  # rows of a tile that stand for one


@dataclass(frozen=True)
class Traffic:
    """Bytes asked of the cache, and those that were not there."""

    asked: float
    missed: float


class Cache:
    """Holds `capacity` bytes of the most recently used units."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held = capacity, 0
        self.units: OrderedDict[Hashable, int] = OrderedDict()

    def load(self, unit: Hashable, size: int) -> bool:
        """Whether the unit was there; it is now."""
        if unit in self.units:
            self.units.move_to_end(unit)
            return True
        self.units[unit] = size
        self.held += size
        while self.held > self.capacity and len(self.units) > 1:
            self.held -= self.units.popitem(last=False)[1]
        return False


def steady_traffic(programs: Sequence[Sequence[Sequence[Unit]]], capacity: float) -> Traffic:
    """Bytes of all programs' second half of moments.

    programs[i][k] are the units that program i loads at its k-th moment, when all other programs
    are at theirs.
    """
    cached, moments = Cache(capacity), min(map(len, programs))
    asked = missed = 0
    for moment in range(moments):
        for program in programs:
            for unit, size in program[moment]:
                hit = cached.load(unit, size)
                if moment >= moments // 2:
                    asked += size
                    missed += 0 if hit else size
    return Traffic(asked, missed)


class _Enough(BaseException):
    """Ends a program early; no `Exception`, which the interpreter would wrap in its own."""


def _record(launch: Any, resident: int, loads_of_a_tile: int) -> dict[int, list[tuple[int, int]]]:
    """(address, rows) of every load of a tile, by program in the order a GPU starts them."""
    from triton.runtime import interpreter

    builder, seen = interpreter.InterpreterBuilder, {}
    load, call = builder.create_masked_load, interpreter.GridExecutor.__call__
    state = {"program": 0, "grid": (1, 1, 1)}

    def record(self, pointers, mask, *rest, **options):  # type: ignore[no-untyped-def]
        if pointers.data.ndim == 2:
            loads = seen.setdefault(state["program"], [])
            loads.append((int(pointers.data.min()), pointers.data.shape[0]))
            if len(loads) >= _TILES * loads_of_a_tile:
                raise _Enough
        return load(self, pointers, mask, *rest, **options)

    class Limited:
        """The kernel, for the programs and tiles that are wanted."""

        def __init__(self, function: Any) -> None:
            self.function, self.__globals__ = function, function.__globals__
            self.__signature__, self.__name__ = inspect.signature(function), function.__name__
            self.__annotations__ = function.__annotations__

        def __call__(self, **arguments: Any) -> None:
            x, y, z = interpreter.interpreter_builder.grid_idx
            wide, high, _ = interpreter.interpreter_builder.grid_dim
            state["program"] = x + wide * (y + high * z)
            if state["program"] < resident:
                try:
                    self.function(**arguments)
                except _Enough:
                    pass

    def limited(self, *args: Any, **kwargs: Any) -> Any:
        function, self.fn = self.fn, Limited(self.fn)
        try:
            return call(self, *args, **kwargs)
        finally:
            self.fn = function

    patched: set[str] = set()

    def helper(self, *args: Any, **kwargs: Any) -> Any:
        """A jitted function that a kernel calls: patched once, not at each call, which is slow."""
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = helper
    builder.create_masked_load = record
    builder.create_dot = lambda self, a, b, accumulator, *options: accumulator
    interpreter.GridExecutor.__call__ = limited
    launch()
    return seen


def _fused(tokens: int, classes: int, dims: tuple[int, int], resident: int, arch: str) -> Any:
    """What the programs of the fused statistics kernel load, moment by moment."""
    import torch

    from esr_kernels.common.transform import LogitTransform
    from esr_kernels.divergence import fused_triton
    from esr_kernels.divergence.call import Operands
    from esr_kernels.divergence.losses import ReverseKL
    from esr_kernels.divergence.statistics import RowSpec

    full = fused_triton.BLOCKS["16-bit", arch]
    # The same grid of smaller tiles: what counts is which tile is loaded when.
    blocks = full._replace(tokens=full.tokens // _SHRINK, classes=full.classes // _SHRINK, depth=16)
    rows, columns = -(-tokens // _SHRINK), -(-classes // _SHRINK)
    tensors = [torch.zeros(n, blocks.depth).bfloat16() for n in (rows, columns) * 2]
    x = Operands(tensors[0], tensors[1], None, None, tensors[2], tensors[3], None, None, None)
    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
    fused_triton.processors = lambda device: resident  # a program each
    seen = _record(lambda: fused_triton.fused_stats(x, spec, blocks), resident, 4)
    operands = zip(tensors, (dims[0], dims[0], dims[1], dims[1]), strict=True)
    depth_from = sorted((tensor.data_ptr(), depth) for tensor, depth in operands)

    def moments(loads: list[tuple[int, int]]) -> list[list[Unit]]:
        """Each product of a tile walks the depth of its two operands, a slab at a time."""
        found = []
        for at in range(0, len(loads), 2):
            for slab in range(_SLABS):
                units = []
                for address, tile_rows in loads[at : at + 2]:
                    depth = [d for start, d in depth_from if start <= address][-1]
                    size = tile_rows * _SHRINK * depth * 2 // _SLABS
                    units.append(((address, slab), size))
                found.append(units)
        return found

    return [moments(loads) for _, loads in sorted(seen.items())]


@cache
def fused_traffic(
    tokens: int, classes: int, dims: tuple[int, int], resident: int, arch: str, capacity: float
) -> Traffic:
    """`Traffic` of the fused statistics kernel, from a process whose Triton interprets."""
    command = [sys.executable, "-m", "bench.l2_model"]
    command += [str(x) for x in (tokens, classes, *dims, resident, arch, capacity)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    return Traffic(**json.loads(done.stdout))


def main() -> None:
    tokens, classes, student, teacher, resident = map(int, sys.argv[1:6])
    arch, capacity = sys.argv[6], float(sys.argv[7])
    programs = _fused(tokens, classes, (student, teacher), resident, arch)
    print(json.dumps(asdict(steady_traffic(programs, capacity))))


if __name__ == "__main__":
    main()
