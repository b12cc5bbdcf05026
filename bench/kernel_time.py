"""Predicted seconds of one compiled kernel: the longest of its memory, cache and issue times.

Issue slots come from the machine code. Instructions outside of loops are issued once by each warp
of a program; the trips of a loop follow from the bytes that it loads, or from the tiles that it
multiplies. The last wave of programs, where it does not fill the GPU, takes as long as its busiest
processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bench.ahead_of_time import Launched
from bench.gpu_static import resources
from bench.gpus import HBM_SHARE, ISSUE_SHARE, Gpu
from bench.l2_model import fused_traffic
from bench.machine_code import Code, code_of, is_product

_SPECIAL = ("MUFU", "v_exp", "v_log", "v_rcp", "v_sqrt", "v_rsq")
_FP32 = ("F", "HFMA2.MMA")


@dataclass(frozen=True)
class Sizes:
    """Of the call that a kernel belongs to."""

    tokens: int
    classes: int
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """Where the seconds of one kernel come from."""

    seconds: float
    memory: float
    cache: float
    issue: float
    waves: float
    hbm_bytes: float
    l2_bytes: float

    @property
    def bound(self) -> str:
        terms = {"memory": self.memory, "cache": self.cache, "issue": self.issue}
        return max(terms, key=terms.__getitem__)


_codes: dict[int, tuple[Any, Code]] = {}


def _code(kernel: Any) -> Code:
    if id(kernel) not in _codes:
        _codes[id(kernel)] = kernel, code_of(kernel)  # holds the kernel, so that its id stays its
    return _codes[id(kernel)][1]


def slots(code: Code, body: Any, gpu: Gpu) -> float:
    """Cycles of one scheduler that a warp takes for these instructions."""
    names = [code.instructions[at].opcode for at in body]
    special = sum(name.startswith(_SPECIAL) for name in names) * gpu.special_cycles
    fp32 = sum(name.startswith(_FP32) for name in names) * gpu.fp32_cycles
    return max(len(names) * gpu.issue_cycles, special, fp32)


def _bytes_of_loads(code: Code, body: Any) -> int:
    """Bytes that one lane loads from global memory."""
    total = 0
    for at in body:
        name = code.instructions[at].opcode
        if name.startswith(("LDG.", "LDGSTS")):
            total += 16 if ".128" in name else 8 if ".64" in name else 4
        elif name.startswith(("global_load", "buffer_load")):
            total += 4 * int(name[-1]) if name[-2] == "x" else 4
    return total


def predict(launched: Launched, gpu: Gpu, sizes: Sizes) -> Prediction:
    """The time of one launch on an otherwise idle GPU."""
    code = _code(launched.kernel)
    if code.count(is_product):
        return _tiled(launched, code, gpu, sizes)
    warps = launched.kernel.metadata.num_warps
    lanes = launched.kernel.metadata.warp_size * warps
    everything = set(range(len(code.instructions)))
    in_loops = set().union(*(loop.body for loop in code.loops)) if code.loops else set()
    cycles = launched.programs * warps * slots(code, everything - in_loops, gpu)
    moved = _moved(launched, sizes)
    loaded = {loop: _bytes_of_loads(code, loop.body) * lanes for loop in code.loops if loop.inner}
    streams = {loop: size for loop, size in loaded.items() if size}
    for loop, size in streams.items():
        trips = moved / len(streams) / size
        cycles += trips * warps * slots(code, loop.body, gpu)
    return _waved(launched, gpu, cycles, moved, moved)


def _moved(launched: Launched, sizes: Sizes) -> float:
    """Bytes of memory. Every kernel passes its tensors once, but the draw, which reads one tile of
    the head for each row, and the scaling in place by a loss's upstream gradient, which is 1 here.
    """
    in_place = launched.constants.get("total_ptr", ...) is None
    if launched.function.fn.__name__ == "_scale_kernel" and in_place:
        return 0.0
    if launched.function.fn.__name__ == "_draw_kernel" and "BLOCK_D" in launched.constants:
        classes = launched.constants["TILE"]
        return launched.programs * classes * sizes.dims[0] * 2
    return launched.tensor_bytes


def _slots_of_gpu(launched: Launched, gpu: Gpu) -> int:
    registers, _, columns = resources(launched.kernel)
    metadata = launched.kernel.metadata
    return gpu.resident_programs(registers, metadata.shared, metadata.num_warps, columns)


def _waved(
    launched: Launched, gpu: Gpu, cycles: float, hbm_bytes: float, l2_bytes: float
) -> Prediction:
    resident = _slots_of_gpu(launched, gpu)
    waves = launched.programs / resident
    whole, rest = divmod(launched.programs, resident)
    memory = hbm_bytes / (gpu.hbm * HBM_SHARE)
    cached = l2_bytes / gpu.l2
    issue = cycles / (gpu.processors * 4 * gpu.clock * ISSUE_SHARE)
    of_wave = max(memory, cached, issue) / waves
    seconds = whole * of_wave
    if rest:
        # Half of the processors draw the memory's whole bandwidth.
        fill, of_program = rest / resident, 1 / launched.programs
        busiest = math.ceil(rest / gpu.processors) * gpu.processors
        seconds += max(
            memory * rest * of_program / min(1.0, 2 * fill),
            cached * rest * of_program / min(1.0, 2 * fill),
            issue * of_program * busiest,
        )
    return Prediction(seconds, memory, cached, issue, waves, hbm_bytes, l2_bytes)


def _tiled(launched: Launched, code: Code, gpu: Gpu, sizes: Sizes) -> Prediction:
    """A kernel that multiplies tiles and folds each into statistics.

    The products go at the vendor's sustained rate, or as fast as caches deliver. Where one program
    has a processor to itself nothing hides the rest of its loop, which is added.
    """
    constants = launched.constants
    rows = constants.get("BLOCK_T") or constants["BLOCK_B"]
    columns = constants.get("BLOCK_V") or constants["TILE"]
    tiles = math.ceil(sizes.tokens / rows) * math.ceil(sizes.classes / columns)
    warps = launched.kernel.metadata.num_warps
    multiply = frozenset().union(*(loop.body for loop in code.product_loops))
    rest = set(range(len(code.instructions))) - multiply
    cycles = tiles * warps * slots(code, rest, gpu)
    asked = tiles * (rows + columns) * sum(sizes.dims) * 2.0
    missed = float(launched.tensor_bytes)
    resident = _slots_of_gpu(launched, gpu)
    if launched.function.fn.__name__ == "_fused_statistics_kernel":
        dims = (sizes.dims[0], sizes.dims[1])
        capacity = gpu.cache
        traffic = fused_traffic(sizes.tokens, sizes.classes, dims, resident, gpu.arch, capacity)
        missed = max(missed, asked * traffic.missed / traffic.asked)
    products = 2.0 * tiles * rows * columns * sum(sizes.dims) / gpu.product_rate
    memory, cached = missed / (gpu.hbm * HBM_SHARE), asked / gpu.l2
    issue = cycles / (gpu.processors * 4 * gpu.clock * ISSUE_SHARE)
    loop_seconds = max(products, memory, cached)
    alone = resident <= gpu.processors
    waves = launched.programs / resident
    seconds = (loop_seconds + issue) if alone else max(loop_seconds, issue)
    seconds *= math.ceil(waves) / waves
    return Prediction(seconds, memory, cached, issue, waves, missed, asked)
