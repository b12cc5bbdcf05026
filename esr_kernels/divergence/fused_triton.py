"""Projection and row statistics in one Triton kernel: no logits are written to memory.

One program computes a block of tokens and one split of the classes. It loops over the tiles of its
split. For each, two matrix products over D accumulate the student's and then the teacher's logits,
fp32, in registers at the same time. The epilogue applies bias, scale, softcap and temperature and
folds the tile into ten numbers a token, the columns of `statistics`; reductions run along the
classes of the tile. Splits merge in a fixed order (`statistics.merge_parts`): a launch repeats bit
for bit.

FLOPs  2 T V (Ds + Dt), the two products; the epilogue adds about 25 T V and 2 T V exponentials.
Bytes  From memory: both heads once for every wave of programs that run over the same split together
       (a group of token blocks shares a tile of the heads in the cache, and its hidden states stay
       there from tile to tile), 40 bytes a token and split written. The row passes that this
       replaces move 16 bytes a logit element.
       From cache: a tile loads (block of tokens + block of classes) * (Ds + Dt) operands, 64 FLOPs
       a byte: on sm_90 this bandwidth, not the matrix units, is the bound (`calibration.Rates`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from esr_kernels.common.launch import ceil_div, launch, processors
from esr_kernels.common.logits_triton import online_softmax, transform_logits
from esr_kernels.common.projection_triton import (
    check_fused,
    current_arch,
    operand_kind,
    project,
    project_described,
)
from esr_kernels.divergence.call import Operands
from esr_kernels.divergence.rows_triton import store_statistics
from esr_kernels.divergence.statistics import COLUMNS, RowSpec


class Blocks(NamedTuple):
    """Tile of one program: tokens x classes, `depth` columns of D at a time."""

    tokens: int
    classes: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False  # of the operands' blocks, where their rows start at 16 bytes


# (operand, arch) -> tile, keyed on nothing that changes from step to step. The register file limits
# the tile. A thread has at most 255 registers; the two accumulators take
# 2 * tokens * classes / threads of them, the epilogue about as many again for the log-ratio and one
# model's probabilities on their way into the sums, the ten statistics and the addresses the rest.
#   sm_90   128 x 128 on 256 threads: 128 registers of accumulators, 255 in all. wgmma reads its
#           operands from shared memory, (128 + 128) * 64 * 2 bytes a stage: 5 stages, 160 KiB,
#           hide the latency of loads, which 8 warps alone would not. A larger tile spills.
#   sm_80   mma.sync holds fragments of the operands in registers too: half the tile.
#   sm_100  tcgen05 accumulates in tensor memory, but the epilogue needs both tiles in registers at
#           once, and moving them there costs more than it saves: half the tile.
#   gfx942  512 lanes with up to 256 registers, at two waves to a SIMD: 64 of accumulators, 242 in
#           all. Two stages are one buffer of 32 KiB in LDS and one in registers.
#   fp32    no matrix unit of NVIDIA multiplies full fp32; 64 x 64 keeps that arithmetic unspilled.
#           gfx942 has one, and takes the full tile.
#   unaligned  rows that do not start at 16 bytes arrive element by element, through registers.
# bench/gpu_static.py prints registers and spills of every entry.
BLOCKS: dict[tuple[str, str], Blocks] = {
    ("16-bit", "sm_80"): Blocks(128, 64, 64, 8, 3),
    ("16-bit", "sm_90"): Blocks(128, 128, 64, 8, 5, True),
    ("16-bit", "sm_100"): Blocks(128, 64, 64, 8, 3),
    ("16-bit", "gfx942"): Blocks(128, 128, 64, 8, 2),
    ("fp32", "sm_80"): Blocks(64, 64, 32, 8, 3),
    ("fp32", "sm_90"): Blocks(64, 64, 32, 8, 3),
    ("fp32", "sm_100"): Blocks(64, 64, 32, 8, 3),
    ("fp32", "gfx942"): Blocks(128, 128, 32, 8, 2),
    ("unaligned", "sm_80"): Blocks(64, 64, 32, 8, 2),
    ("unaligned", "sm_90"): Blocks(64, 64, 32, 8, 2),
    ("unaligned", "sm_100"): Blocks(64, 64, 32, 8, 2),
    ("unaligned", "gfx942"): Blocks(64, 64, 32, 8, 2),
}
# Programs that fill a large GPU about four times over, and at most twenty times: more of them would
# hold more parts in memory for less and less of a last round (`_split_classes`).
_WANTED_PROGRAMS, _MOST_TIMES = 512, 5
# Token blocks that walk the classes side by side. The programs that run at once, 132 on an H100,
# hold about as many blocks of tokens as of classes, 31 MB of operands at T = 8192 and D = 1536 and
# 3584, which a cache of 50 MB keeps. All 64 blocks of tokens first, 84 MB of hidden states would
# pass it once for every tile of classes.
GROUP = 8


@triton.jit
def _fold(z, difference, classes, n_classes, state):
    """Fold a tile of one model's logits into its five statistics, each [BLOCK_T]."""
    top, total, centred, difference_sum, where = state
    tile_top = tl.max(z, 1)
    first = tl.min(tl.where(z == tile_top[:, None], classes[None, :], n_classes), 1)
    where = tl.where(tile_top > top, first, where)
    top, total, centred, difference_sum = online_softmax(
        z, difference, tile_top, (top, total, centred, difference_sum), True
    )
    return top, total, centred, difference_sum, where


@triton.jit
def _present(inside, classes, bias_ptr, transform):
    """`inside` without the classes that a bias of -inf removes, which a softcap would bring back.

    A mask of [BLOCK_V] takes fewer registers than a comparison of the tile's logits.
    """
    _, scale, softcap, _ = transform
    if bias_ptr is not None and softcap is not None:
        bias = tl.load(bias_ptr + classes).to(tl.float32)
        if scale is not None:
            bias = bias * scale
        inside = inside & (bias != -float("inf"))
    return inside


@triton.jit
def _masked_transform(z, inside, transform):
    """Transformed logits of a tile, -inf where `inside` is false; the bias is in `z` already."""
    z, _ = transform_logits(z, 0, True, transform)
    return tl.where(inside[None, :], z, -float("inf"))


@triton.jit
def _logits(
    hidden, weight, layout, row, tile, n_rows, classes, DEPTH: tl.constexpr, T: tl.constexpr
):
    """A tile of one model's logits: `hidden` and `weight` are pointers or descriptors."""
    bias_ptr, hidden_stride, weight_stride, depth = layout
    if hidden_stride is None:
        z = project_described(hidden, weight, bias_ptr, depth, row, classes, tile, T, DEPTH)
    else:
        # Rows and classes beyond the last repeat it: loads need no mask, and what they compute is
        # dropped at the store and by the -inf.
        rows = tl.minimum(row + tl.arange(0, T), n_rows - 1)
        operands = (hidden, weight, bias_ptr, hidden_stride, weight_stride, depth)
        z = project(operands, rows, classes, DEPTH)
    return z


@triton.jit
def _fused_statistics_kernel(
    s_hidden,
    s_weight,
    t_hidden,
    t_weight,
    s_layout,
    t_layout,
    parts_ptr,
    n_rows,
    n_classes,
    n_splits,
    split_classes,
    student,
    teacher,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N_STATS: tl.constexpr,
):
    # A group of token blocks at a time, and of it all blocks in one split before the next split.
    of_a_group = GROUP * n_splits
    first = tl.program_id(0) // of_a_group * GROUP
    height = tl.minimum(tl.cdiv(n_rows, BLOCK_T) - first, GROUP)
    in_group = tl.program_id(0) % of_a_group
    split = in_group // height
    row = (first + in_group % height) * BLOCK_T
    rows = row + tl.arange(0, BLOCK_T)
    start = split * split_classes
    stop = tl.minimum(start + split_classes, n_classes)

    s_top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    t_top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    s_where = tl.zeros([BLOCK_T], tl.int32)
    t_where = tl.zeros([BLOCK_T], tl.int32)
    s_total = tl.zeros([BLOCK_T], tl.float32)
    t_total = tl.zeros([BLOCK_T], tl.float32)
    s_difference = tl.zeros([BLOCK_T], tl.float32)
    t_difference = tl.zeros([BLOCK_T], tl.float32)
    s_centred = tl.zeros([BLOCK_T], tl.float32)
    t_centred = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(start, stop, BLOCK_V):
        classes = tile + tl.arange(0, BLOCK_V)
        inside = classes < stop
        live = tl.minimum(classes, n_classes - 1)
        s = _logits(s_hidden, s_weight, s_layout, row, tile, n_rows, live, BLOCK_D, BLOCK_T)
        s = _masked_transform(s, _present(inside, live, s_layout[0], student), student)
        t = _logits(t_hidden, t_weight, t_layout, row, tile, n_rows, live, BLOCK_D, BLOCK_T)
        t = _masked_transform(t, _present(inside, live, t_layout[0], teacher), teacher)
        difference = t - s
        s_state = (s_top, s_total, s_centred, s_difference, s_where)
        t_state = (t_top, t_total, t_centred, t_difference, t_where)
        s_top, s_total, s_centred, s_difference, s_where = _fold(
            s, difference, classes, n_classes, s_state
        )
        t_top, t_total, t_centred, t_difference, t_where = _fold(
            t, difference, classes, n_classes, t_state
        )

    store_statistics(
        parts_ptr + (rows.to(tl.int64) * n_splits + split) * N_STATS,
        (s_top, s_total, s_centred, s_difference, s_where),
        (t_top, t_total, t_centred, t_difference, t_where),
        rows < n_rows,
    )


def _split_classes(rows: int, classes: int, blocks: Blocks, processors: int) -> tuple[int, int]:
    """(splits, classes in each), whole tiles: enough programs for the machine, and of the numbers
    that are enough the smallest with which the busiest processor has the fewest tiles."""
    tiles = ceil_div(classes, blocks.classes)
    programs = max(ceil_div(rows, blocks.tokens), 1)
    fewest = min(tiles, max(1, _WANTED_PROGRAMS // programs))

    def tiles_of_busiest(each: int) -> int:
        return each * ceil_div(programs * ceil_div(tiles, each), processors)

    most_each, least_each = (ceil_div(tiles, n) for n in (fewest, _MOST_TIMES * fewest))
    each = min(range(most_each, least_each - 1, -1), key=tiles_of_busiest) * blocks.classes
    return ceil_div(classes, each), each


class _Side(NamedTuple):
    """One model's arguments of the kernel."""

    hidden: Any
    weight: Any
    layout: tuple[Any, ...]  # (bias, stride of hidden rows, of head rows, depth)


def _side(hidden: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks) -> _Side:
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    depth = hidden.shape[1]
    if not (blocks.descriptors and _starts_at_16_bytes(hidden) and _starts_at_16_bytes(weight)):
        return _Side(hidden, weight, (bias, hidden.stride(0), weight.stride(0), depth))

    def described(x: Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, blocks.depth])

    layout = bias, None, None, depth
    return _Side(described(hidden, blocks.tokens), described(weight, blocks.classes), layout)


def _starts_at_16_bytes(x: Tensor) -> bool:
    """Whether every row does, none overlaps the next, and there is one, as descriptors want it."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x.numel() > 0 and aligned and x.stride(0) >= x.shape[1]


def _removes_by_bias(x: Operands, spec: RowSpec) -> bool:
    """Whether the kernel masks classes by their bias (`_present`)."""
    pairs = (x.student_bias, spec.student), (x.teacher_bias, spec.teacher)
    return any(bias is not None and side.softcap is not None for bias, side in pairs)


def fused_stats(x: Operands, spec: RowSpec, blocks: Blocks | None = None) -> Tensor:
    """Statistics of every row's logits, straight from hidden states and heads.

    The result of `rows_triton.tile_stats` on hidden @ weight.T, without those logits in memory;
    `statistics.merge_parts` finishes either.

    Args:
        x: operands over the shared classes: student_hidden [T, Ds] and student_weight [V, Ds] of
            one dtype, bf16, fp16 or fp32; teacher_hidden [T, Dt] and teacher_weight [V, Dt]
            likewise; biases [V] or None, where an entry of -inf removes a class.
        spec: the transforms of both models' logits; its divergence is not used.
        blocks: the tile; None takes the committed one for the operands' dtype and the GPU.

    Returns:
        [T, splits, COLUMNS] fp32.

    Raises:
        TypeError for operands other than bf16, fp16 and fp32, or of mixed dtype within a model.

    Exactness: products of 16-bit operands accumulate in fp32 on the matrix units; fp32 operands
        multiply in full fp32 (no TF32), statistics are fp32. The order of every sum is fixed.
    Memory: the returned parts, 40 bytes a token and split. An operand whose rows are not contiguous
        is copied.
    Cost: 2 T V (Ds + Dt) FLOPs; the bytes are in the module's docstring.
    """
    check_fused("student_", x.student_hidden, x.student_weight)
    check_fused("teacher_", x.teacher_hidden, x.teacher_weight)
    tokens, classes = x.student_hidden.shape[0], x.student_weight.shape[0]
    if blocks is None:
        kind = operand_kind(x.student_weight, x.teacher_weight)
        blocks = BLOCKS[kind, current_arch(x.student_hidden)]
        if _removes_by_bias(x, spec):
            # The mask takes registers that 128 classes leave none of.
            blocks = blocks._replace(classes=min(blocks.classes, 64))
    splits, each = _split_classes(tokens, classes, blocks, processors(x.student_hidden.device))
    parts = torch.empty(
        tokens, splits, COLUMNS, dtype=torch.float32, device=x.student_hidden.device
    )
    if not tokens:
        return parts
    programs = ceil_div(tokens, blocks.tokens) * splits
    student = _side(x.student_hidden, x.student_weight, x.student_bias, blocks)
    teacher = _side(x.teacher_hidden, x.teacher_weight, x.teacher_bias, blocks)
    launch(_fused_statistics_kernel, (programs,), x.student_hidden)(
        student.hidden,
        student.weight,
        teacher.hidden,
        teacher.weight,
        student.layout,
        teacher.layout,
        parts_ptr=parts,
        n_rows=tokens,
        n_classes=classes,
        n_splits=splits,
        split_classes=each,
        student=spec.student.kernel_argument(None),
        teacher=spec.teacher.kernel_argument(None),
        GROUP=GROUP,
        BLOCK_T=blocks.tokens,
        BLOCK_V=blocks.classes,
        BLOCK_D=blocks.depth,
        N_STATS=COLUMNS,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return parts
