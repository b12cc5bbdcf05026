"""Other tiles of the fused statistics kernel, compiled for sm_90 and counted. Needs no GPU.

    python -m bench.fused_variants          a minute; writes the record that docs/gpu.md shows

The committed kernel is bound by the cache: a tile of 128 x 128 loads its operands at 64 FLOPs a
byte. A larger tile loads fewer, if its logits find a place: in the registers of both models at
once, or, the student's, in a scratch of each program that stays in the cache and is read back in
strips (`_parked_kernel` below). The committed kernel, and of the others the last, load by tensor
descriptors, which need no registers for addresses. The time is `bench.kernel_time`'s, and takes no
account of what spilled registers cost, nor of how loads are issued.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from bench.ahead_of_time import TARGETS, Launched, launches_compile
from bench.gpu_static import resources
from bench.gpus import GPUS, ISSUE_SHARE
from bench.kernel_time import slots
from bench.machine_code import code_of, is_local
from bench.predict import _product
from bench.products import product_seconds
from bench.walk import empty
from esr_kernels.common.launch import launch, processors
from esr_kernels.common.projection_triton import project
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import fused_triton
from esr_kernels.divergence.call import Operands
from esr_kernels.divergence.fused_triton import Blocks, _fold, _masked_transform
from esr_kernels.divergence.losses import ReverseKL
from esr_kernels.divergence.rows_triton import store_statistics
from esr_kernels.divergence.statistics import COLUMNS, RowSpec

RESULTS = Path(__file__).parent / "results" / "fused_variants.json"
_TOKENS, _CLASSES, _DIMS = 8192, 151_936, (1536, 3584)
_STRIPS = tl.constexpr(8)
# name -> tile, whether the student's logits wait in a scratch, and whether descriptors that the
# kernel makes load it.
VARIANTS = {
    "committed": (fused_triton.BLOCKS["16-bit", "sm_90"], False, False),
    "pointers": (Blocks(128, 128, 64, 8, 4), False, False),
    "both in registers, 8 warps": (Blocks(128, 256, 64, 8, 3), False, False),
    "both in registers, 16 warps": (Blocks(128, 256, 64, 16, 3), False, False),
    "both in registers, high": (Blocks(256, 128, 64, 16, 3), False, False),
    "student parked, 8 warps": (Blocks(128, 256, 64, 8, 3), True, False),
    "student parked, 16 warps": (Blocks(128, 256, 64, 16, 3), True, False),
    "student parked, high": (Blocks(256, 128, 64, 16, 3), True, False),
    "student parked, high, descriptors": (Blocks(256, 128, 64, 16, 3), True, True),
}


@triton.jit
def _project_by_descriptors(
    operands,
    n_rows,
    n_classes,
    row,
    tile,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    D: tl.constexpr,
):
    """`project`, where rows and classes follow one another. Beyond the last it computes zeros."""
    hidden_ptr, weight_ptr, _, hidden_stride, weight_stride, depth = operands
    hidden = tl.make_tensor_descriptor(hidden_ptr, [n_rows, depth], [hidden_stride, 1], [ROWS, D])
    weight = tl.make_tensor_descriptor(
        weight_ptr, [n_classes, depth], [weight_stride, 1], [CLASSES, D]
    )
    logits = tl.zeros([ROWS, CLASSES], tl.float32)
    for start in range(0, depth, D):
        w = weight.load([tile, start])
        logits = tl.dot(hidden.load([row, start]), w.T, logits)
    return logits


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns, each where its thread has them."""
    x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(x, [0, 2, 1]))


@triton.jit
def _strip(t, parked, classes, n_classes, s_state, t_state):
    # Joined and split again, both models' logits have one layout: nothing is computed in two.
    s, t = tl.split(tl.join(tl.load(parked), t))
    difference = t - s
    s_state = _fold(s, difference, classes, n_classes, s_state)
    return s_state, _fold(t, difference, classes, n_classes, t_state)


@triton.jit
def _half(t, parked, classes, n_classes, s_state, t_state):
    """Four strips."""
    width: tl.constexpr = t.shape[1] // 4
    left, right = _halves(t)
    a, b = _halves(left)
    c, d = _halves(right)
    s_state, t_state = _strip(a, parked, classes, n_classes, s_state, t_state)
    parked, classes = parked + width, classes + width
    s_state, t_state = _strip(b, parked, classes, n_classes, s_state, t_state)
    parked, classes = parked + width, classes + width
    s_state, t_state = _strip(c, parked, classes, n_classes, s_state, t_state)
    parked, classes = parked + width, classes + width
    return _strip(d, parked, classes, n_classes, s_state, t_state)


@triton.jit
def _parked_kernel(
    s_operands,
    t_operands,
    parts_ptr,
    scratch_ptr,
    n_rows,
    n_classes,
    n_splits,
    split_classes,
    student,
    teacher,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N_STATS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    tile_rows = tl.arange(0, BLOCK_T)
    scratch = scratch_ptr + (tl.program_id(0) * BLOCK_T + tile_rows[:, None]) * BLOCK_V
    width: tl.constexpr = BLOCK_V // _STRIPS
    parked = scratch + tl.arange(0, width)[None, :]
    for unit in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_T) * n_splits, tl.num_programs(0)):
        split = unit % n_splits
        row = unit // n_splits * BLOCK_T
        rows = row + tile_rows
        live_rows = tl.minimum(rows, n_rows - 1)
        start = split * split_classes
        stop = tl.minimum(start + split_classes, n_classes)
        zero = tl.zeros([BLOCK_T], tl.float32)
        none = tl.zeros([BLOCK_T], tl.int32)
        s_state = (zero - float("inf"), zero, zero, zero, none)
        t_state = (zero - float("inf"), zero, zero, zero, none)
        for tile in range(start, stop, BLOCK_V):
            classes = tile + tl.arange(0, BLOCK_V)
            live = tl.minimum(classes, n_classes - 1)
            if DESCRIPTORS:
                s = _project_by_descriptors(
                    s_operands, n_rows, n_classes, row, tile, BLOCK_T, BLOCK_V, BLOCK_D
                )
            else:
                s = project(s_operands, live_rows, live, BLOCK_D)
            tl.store(
                scratch + tl.arange(0, BLOCK_V)[None, :],
                _masked_transform(s, classes < stop, student),
            )
            if DESCRIPTORS:
                t = _project_by_descriptors(
                    t_operands, n_rows, n_classes, row, tile, BLOCK_T, BLOCK_V, BLOCK_D
                )
            else:
                t = project(t_operands, live_rows, live, BLOCK_D)
            left, right = _halves(_masked_transform(t, classes < stop, teacher))
            tl.debug_barrier()  # other threads' stores
            first = tile + tl.arange(0, width)
            s_state, t_state = _half(left, parked, first, n_classes, s_state, t_state)
            first, half = first + BLOCK_V // 2, parked + BLOCK_V // 2
            s_state, t_state = _half(right, half, first, n_classes, s_state, t_state)
        out = parts_ptr + (rows.to(tl.int64) * n_splits + split) * N_STATS
        store_statistics(out, s_state, t_state, rows < n_rows)


def statistics(
    operands: list[torch.Tensor], blocks: Blocks, parked: bool, descriptors: bool
) -> torch.Tensor:
    """Parts of every row's statistics, of (student hidden, head, teacher hidden, head)."""
    hidden, head, t_hidden, t_head = operands
    if not parked:
        x = Operands(hidden, head, None, None, t_hidden, t_head, None, None, None)
        spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
        return fused_triton.fused_stats(x, spec, blocks)
    tokens, classes, device = len(hidden), len(head), hidden.device
    programs = processors(device)
    splits, each = fused_triton._split_classes(tokens, classes, blocks, programs)
    plain = LogitTransform().kernel_argument(None)
    parts, scratch = (
        torch.empty(*shape, dtype=torch.float32, device=device)
        for shape in ((tokens, splits, COLUMNS), (programs, blocks.tokens, blocks.classes))
    )
    launch(_parked_kernel, (programs,), hidden)(
        (hidden, head, None, hidden.stride(0), head.stride(0), hidden.shape[1]),
        (t_hidden, t_head, None, t_hidden.stride(0), t_head.stride(0), t_hidden.shape[1]),
        parts,
        scratch,
        n_rows=tokens,
        n_classes=classes,
        n_splits=splits,
        split_classes=each,
        student=plain,
        teacher=plain,
        BLOCK_T=blocks.tokens,
        BLOCK_V=blocks.classes,
        BLOCK_D=blocks.depth,
        N_STATS=COLUMNS,
        DESCRIPTORS=descriptors,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return parts


def _compiled(blocks: Blocks, parked: bool, descriptors: bool) -> Launched:
    operands = [empty(n, dim) for dim in _DIMS for n in (_TOKENS, _CLASSES)]
    with launches_compile(TARGETS["sm_90"]) as launched:
        statistics(operands, blocks, parked, descriptors)
    return launched[0]


def _counted(blocks: Blocks, parked: bool, launched: Launched) -> dict[str, Any]:
    kernel, gpu = launched.kernel, GPUS["H100"]
    code = code_of(kernel)
    multiply = frozenset().union(*(loop.body for loop in code.product_loops))
    rest = set(range(len(code.instructions))) - multiply
    registers, spilled, _ = resources(kernel)
    pairs_of_lane = blocks.tokens * blocks.classes / (32 * blocks.warps)
    tiles = -(-_TOKENS // blocks.tokens) * -(-_CLASSES // blocks.classes)
    loads = tiles * (blocks.tokens + blocks.classes) * sum(_DIMS) * 2.0
    # Written once and read once, 4 bytes each.
    waits = 8.0 * tiles * blocks.tokens * blocks.classes * parked
    products = 2.0 * _TOKENS * _CLASSES * sum(_DIMS) / gpu.product_rate
    floor = sum(product_seconds(_product(_TOKENS, _CLASSES, dim), gpu) for dim in _DIMS)
    cycles = tiles * blocks.warps * slots(code, rest, gpu)
    epilogue = cycles / (gpu.processors * 4 * gpu.clock * ISSUE_SHARE)
    return {
        "tile": f"{blocks.tokens} x {blocks.classes}",
        "warps": blocks.warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "local_accesses": code.count(is_local),
        "instructions_a_pair": len(rest) / pairs_of_lane,
        "cache_gb": (loads + waits) / 1e9,
        "over_products": (max(products, (loads + waits) / gpu.l2) + epilogue) / floor,
    }


def main() -> None:
    table: dict[str, Any] = {}
    for name, (blocks, parked, descriptors) in VARIANTS.items():
        table[name] = _counted(blocks, parked, _compiled(blocks, parked, descriptors))
        print(name, table[name], flush=True)
    record = {"what": "compiled, not run", "triton": triton.__version__, "table": table}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
