"""Projection and row statistics in one Triton kernel: no logit is ever in memory.

One program owns a block of tokens and one split of the classes. It walks the tiles of its split;
for each, two matrix products over D accumulate the student's and then the teacher's logits, fp32,
in registers at the same time. The epilogue applies bias, scale, softcap and temperature and folds
the tile into ten numbers a token, the columns of `row_stats`; reductions run along the classes of
the tile. Splits merge in a fixed order (`row_stats.merge_parts`): a launch repeats bit for bit.

FLOPs  2 T V (Ds + Dt), the two products; the epilogue adds about 25 T V and 2 T V exponentials.
Bytes  From memory: both heads once for every wave of programs that walks the same split together
       (neighbouring programs differ in tokens, so that they share a head's tile in the cache), the
       hidden states once a tile from the cache, 40 bytes a token and split written. The row passes
       that this replaces move 16 bytes a logit element.
       From cache: a tile loads (block of tokens + block of classes) * (Ds + Dt) operands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.logits_triton import tanh
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.statistics import COLUMNS, RowSpec


class Blocks(NamedTuple):
    """Tile of one program: tokens x classes, `depth` columns of D at a time."""

    tokens: int
    classes: int
    depth: int
    warps: int
    stages: int


# (operand, arch) -> tile, keyed on nothing that changes from step to step. What limits a tile is
# the register file. A thread has at most 255 registers; the two accumulators take
# 2 * tokens * classes / threads of them, the epilogue about as many again for the gap and one
# model's probabilities on their way into the sums, the ten statistics and the addresses the rest.
#   sm_90   128 x 128 on 256 threads: 128 registers of accumulators, 255 in all. wgmma reads its
#           operands from shared memory, (128 + 128) * 64 * 2 bytes a stage: 4 stages, 128 KiB,
#           hide the latency of loads, which 8 warps alone would not. A larger tile spills.
#   sm_80   mma.sync holds fragments of the operands in registers too: half the tile.
#   sm_100  tcgen05 accumulates in tensor memory, but the epilogue wants both tiles in registers at
#           once, and their way there costs more than it saves: half the tile.
#   gfx942  512 lanes with up to 256 registers, at two waves to a SIMD: 64 of accumulators, 242 in
#           all. Two stages are one buffer of 32 KiB in LDS and one in registers.
#   fp32    no matrix unit of NVIDIA multiplies full fp32; 64 x 64 keeps that arithmetic unspilled.
#           gfx942 has one, and takes the full tile.
#   unaligned  rows that do not start at 16 bytes arrive element by element, through registers.
# bench/gpu_static.py prints registers and spills of every entry.
BLOCKS: dict[tuple[str, str], Blocks] = {
    ("16-bit", "sm_80"): Blocks(128, 64, 64, 8, 3),
    ("16-bit", "sm_90"): Blocks(128, 128, 64, 8, 4),
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
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton loads whole vectors where it sees that a row's length is a multiple of this.
_ALIGNMENT = 16
# Programs that fill a large GPU about four times over, so that the last round is short.
_WANTED_PROGRAMS = 512


@triton.jit
def _project(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    classes,
    hidden_stride,
    weight_stride,
    depth,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden[rows] @ weight[classes].T + bias[classes] in fp32, [BLOCK_T, BLOCK_V]."""
    lane = tl.arange(0, BLOCK_D)
    hidden = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + lane[None, :]
    weight = weight_ptr + classes.to(tl.int64)[:, None] * weight_stride + lane[None, :]
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if HAS_BIAS:
        # Here rather than in the epilogue, which has no registers to spare for it.
        logits += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    for start in range(0, depth, BLOCK_D):
        inside = (lane < depth - start)[None, :]
        h = tl.load(hidden + start, mask=inside, other=0.0)
        w = tl.load(weight + start, mask=inside, other=0.0)
        logits = tl.dot(h, w.T, logits, input_precision="ieee")
    return logits


@triton.jit
def _transform(
    z,
    inside,
    scale,
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
):
    """Transformed logits of a tile, -inf outside."""
    z *= scale
    if HAS_SOFTCAP:
        z = tanh(z / softcap) * softcap
    return tl.where(inside[None, :], z * inv_temperature, -float("inf"))


@triton.jit
def _fold(z, gap, classes, n_classes, top, where, total, gap_sum, centred):
    """Fold a tile of one model's logits into its five statistics, each [BLOCK_T]."""
    tile_top = tl.max(z, 1)
    first = tl.min(tl.where(z == tile_top[:, None], classes[None, :], n_classes), 1)
    where = tl.where(tile_top > top, first, where)
    new_top = tl.maximum(top, tile_top)
    # A tile of -inf only must not turn into exp(-inf + inf).
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    decay = tl.exp(top - base)
    # What the sum of p * (z - max) owes for the maximum that moved.
    shift = tl.where(top == -float("inf"), 0.0, top - base)
    below = z - base[:, None]
    p = tl.exp(below)
    # 0 * inf: a class of probability 0 weighs nothing whatever its logit.
    centred = (centred + shift * total) * decay + tl.sum(tl.where(p == 0, 0.0, p * below), 1)
    gap_sum = gap_sum * decay + tl.sum(tl.where(p == 0, 0.0, p * gap), 1)
    total = total * decay + tl.sum(p, 1)
    return new_top, where, total, gap_sum, centred


@triton.jit
def _fused_statistics_kernel(
    s_hidden_ptr,
    s_weight_ptr,
    t_hidden_ptr,
    t_weight_ptr,
    s_hidden_stride,
    s_weight_stride,
    t_hidden_stride,
    t_weight_stride,
    s_bias_ptr,
    t_bias_ptr,
    parts_ptr,
    n_rows,
    n_classes,
    split_classes,
    s_depth,
    t_depth,
    s_scale,
    s_softcap,
    s_inv_temperature,
    t_scale,
    t_softcap,
    t_inv_temperature,
    S_BIAS: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_BIAS: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    N_STATS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    # Rows and classes beyond the last repeat it: loads need no mask, and what they compute is
    # dropped at the store and by the -inf.
    live_rows = tl.minimum(rows, n_rows - 1)
    split = tl.program_id(1)
    start = split * split_classes
    stop = tl.minimum(start + split_classes, n_classes)

    s_top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    t_top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    s_where = tl.zeros([BLOCK_T], tl.int32)
    t_where = tl.zeros([BLOCK_T], tl.int32)
    s_total = tl.zeros([BLOCK_T], tl.float32)
    t_total = tl.zeros([BLOCK_T], tl.float32)
    s_gap = tl.zeros([BLOCK_T], tl.float32)
    t_gap = tl.zeros([BLOCK_T], tl.float32)
    s_centred = tl.zeros([BLOCK_T], tl.float32)
    t_centred = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(start, stop, BLOCK_V):
        classes = tile + tl.arange(0, BLOCK_V)
        inside = classes < stop
        live = tl.minimum(classes, n_classes - 1)
        s = _project(
            s_hidden_ptr,
            s_weight_ptr,
            s_bias_ptr,
            live_rows,
            live,
            s_hidden_stride,
            s_weight_stride,
            s_depth,
            S_BIAS,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        s = _transform(s, inside, s_scale, s_softcap, s_inv_temperature, S_SOFTCAP)
        t = _project(
            t_hidden_ptr,
            t_weight_ptr,
            t_bias_ptr,
            live_rows,
            live,
            t_hidden_stride,
            t_weight_stride,
            t_depth,
            T_BIAS,
            BLOCK_T,
            BLOCK_V,
            BLOCK_D,
        )
        t = _transform(t, inside, t_scale, t_softcap, t_inv_temperature, T_SOFTCAP)
        gap = t - s
        s_top, s_where, s_total, s_gap, s_centred = _fold(
            s, gap, classes, n_classes, s_top, s_where, s_total, s_gap, s_centred
        )
        t_top, t_where, t_total, t_gap, t_centred = _fold(
            t, gap, classes, n_classes, t_top, t_where, t_total, t_gap, t_centred
        )

    s_norm = tl.where(s_total == 0, 1.0, s_total)
    t_norm = tl.where(t_total == 0, 1.0, t_total)
    # The order of row_stats' columns.
    out = parts_ptr + (rows.to(tl.int64) * tl.num_programs(1) + split) * N_STATS
    owned = rows < n_rows
    tl.store(out + 0, s_top, mask=owned)
    tl.store(out + 1, t_top, mask=owned)
    tl.store(out + 2, tl.log(s_total), mask=owned)
    tl.store(out + 3, tl.log(t_total), mask=owned)
    tl.store(out + 4, s_gap / s_norm, mask=owned)
    tl.store(out + 5, t_gap / t_norm, mask=owned)
    tl.store(out + 6, s_centred / s_norm, mask=owned)
    tl.store(out + 7, t_centred / t_norm, mask=owned)
    tl.store(out + 8, s_where.to(tl.float32), mask=owned)
    tl.store(out + 9, t_where.to(tl.float32), mask=owned)


def current_arch() -> str:
    """The table's name for the GPU in use: its own or that of the nearest smaller one."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(int(target.arch) // 10, "sm_80")


def _operand_kind(*weights: Tensor) -> str:
    if any(weight.shape[1] % _ALIGNMENT for weight in weights):
        return "unaligned"
    return "16-bit" if all(weight.dtype.itemsize == 2 for weight in weights) else "fp32"


def _split_classes(rows: int, classes: int, blocks: Blocks) -> tuple[int, int]:
    """(splits, classes in each): enough programs for the machine, whole tiles each."""
    tiles = triton.cdiv(classes, blocks.classes)
    programs = triton.cdiv(rows, blocks.tokens)
    splits = min(tiles, max(1, _WANTED_PROGRAMS // max(programs, 1)))
    each = triton.cdiv(tiles, splits) * blocks.classes
    return triton.cdiv(classes, each), each


def _transform_arguments(
    model: str, transform: LogitTransform, bias: Tensor | None
) -> dict[str, object]:
    return {
        f"{model}_scale": float(transform.scale),
        f"{model}_softcap": float(transform.softcap or 1.0),
        f"{model}_inv_temperature": 1.0 / transform.temperature,
        f"{model}_bias_ptr": bias,
        f"{model.upper()}_BIAS": bias is not None,
        f"{model.upper()}_SOFTCAP": transform.softcap is not None,
    }


def _rows_contiguous(operand: Tensor) -> Tensor:
    return operand if operand.stride(1) == 1 else operand.contiguous()


def fused_stats(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    blocks: Blocks | None = None,
) -> Tensor:
    """Statistics of every row's logits, straight from hidden states and heads.

    What `rows_triton.tile_stats` says of hidden @ weight.T, without those logits:
    `row_stats.merge_parts` finishes either.

    Args:
        student_hidden: [T, Ds], and `student_weight` [V, Ds] of the same dtype: bf16, fp16 or fp32.
        teacher_hidden: [T, Dt], and `teacher_weight` [V, Dt]: likewise, any Dt.
        spec: the transforms of both models' logits; its divergence plays no part.
        student_bias: [V] or None; an entry of -inf removes a class. `teacher_bias` the same.
        blocks: the tile; None takes the committed one of the operands' dtype and the GPU.

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
    operands = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    for name, hidden, weight in (("student", *operands[:2]), ("teacher", *operands[2:])):
        if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
            raise TypeError(
                f"{name}_hidden and {name}_weight must share a dtype among bfloat16, float16 and "
                f"float32 for the fused kernel, got {hidden.dtype} and {weight.dtype}"
            )
    tokens, classes = student_hidden.shape[0], student_weight.shape[0]
    if blocks is None:
        blocks = BLOCKS[_operand_kind(student_weight, teacher_weight), current_arch()]
    splits, each = _split_classes(tokens, classes, blocks)
    parts = torch.empty(tokens, splits, COLUMNS, dtype=torch.float32, device=student_hidden.device)
    if not tokens:
        return parts
    s_hidden, s_weight, t_hidden, t_weight = map(_rows_contiguous, operands)
    _fused_statistics_kernel[(triton.cdiv(tokens, blocks.tokens), splits)](
        s_hidden,
        s_weight,
        t_hidden,
        t_weight,
        s_hidden.stride(0),
        s_weight.stride(0),
        t_hidden.stride(0),
        t_weight.stride(0),
        parts_ptr=parts,
        n_rows=tokens,
        n_classes=classes,
        split_classes=each,
        s_depth=s_hidden.shape[1],
        t_depth=t_hidden.shape[1],
        BLOCK_T=blocks.tokens,
        BLOCK_V=blocks.classes,
        BLOCK_D=blocks.depth,
        N_STATS=COLUMNS,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_transform_arguments("s", spec.student, student_bias),
        **_transform_arguments("t", spec.teacher, teacher_bias),
    )
    return parts
