"""The first row pass in Triton: ten numbers of each part of a row, from both models' logits.

One program per (token, split of the row). fp32 accumulators and the running maxima stay in the lane
that they belong to, so that no thread waits for another until the row ends.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import launch, split_columns
from esr_kernels.common.logits_triton import lane_max, load_logits, merge_lanes, online_softmax
from esr_kernels.common.projection_triton import threads_of_a_warp
from esr_kernels.divergence.statistics import COLUMNS, RowSpec, Tile

# A thread of the statistics loads groups of this many neighbouring logits, 128 bits.
_WIDTH = tl.constexpr(4)
# (groups of a thread, warps). Counted in the SASS of sm_90 at V = 151,936, without options: 42
# instructions a pair of logits and 48 registers, 40 of 64 warps resident. With 1 group 46 and 40,
# with 4 groups 39 and 79. Loads through shared memory (`num_stages`) take 47 and 63: the resident
# warps have 40 KiB in flight already, so they are not kept.
STATISTICS_BLOCK = (2, 4)


@triton.jit
def _fold(z, difference, block, state):
    """Fold a block of one model's logits into the statistics of each lane.

    The last of them is the first block that has the lane's maximum.
    """
    top, total, centred, difference_sum, where = state
    block_top = lane_max(z)
    where = tl.where(block_top > top, block, where)
    top, total, centred, difference_sum = online_softmax(
        z, difference, block_top, (top, total, centred, difference_sum), False
    )
    return top, total, centred, difference_sum, where


@triton.jit
def _whole_row(row_ptr, offsets, stop, transform, state):
    """(maximum, sum of exponentials, centred sum, difference sum, argmax) of a row from its lanes.

    The argmax is looked up in the blocks that hold the maximum, which are read once more: to keep
    it for each lane takes six instructions an element.
    """
    top, total, centred, difference_sum, where = state
    row_top, total, centred, difference_sum = merge_lanes((top, total, centred, difference_sum))
    classes = tl.where((top == row_top)[None, :, None], where[None, :, None] + offsets, stop)
    z, _ = load_logits(row_ptr, classes, stop, transform)
    # The first class that attains the maximum, as torch.argmax on CPU has it.
    classes = tl.where(z == tl.max(lane_max(z), 0), classes, stop)
    return row_top, total, centred, difference_sum, tl.min(tl.min(tl.min(classes, 2), 0), 0)


@triton.jit
def store_statistics(out, student, teacher, mask):
    """Write one part's statistics, in the order of the columns in `statistics`.

    Each model's are (maximum, sum of exponentials, centred sum, difference sum, argmax).
    """
    s_top, s_total, s_centred, s_difference, s_first = student
    t_top, t_total, t_centred, t_difference, t_first = teacher
    s_norm = tl.where(s_total == 0, 1.0, s_total)
    t_norm = tl.where(t_total == 0, 1.0, t_total)
    tl.store(out + 0, s_top, mask=mask)
    tl.store(out + 1, t_top, mask=mask)
    tl.store(out + 2, tl.log(s_total), mask=mask)
    tl.store(out + 3, tl.log(t_total), mask=mask)
    tl.store(out + 4, s_difference / s_norm, mask=mask)
    tl.store(out + 5, t_difference / t_norm, mask=mask)
    tl.store(out + 6, s_centred / s_norm, mask=mask)
    tl.store(out + 7, t_centred / t_norm, mask=mask)
    tl.store(out + 8, s_first.to(tl.float32), mask=mask)
    tl.store(out + 9, t_first.to(tl.float32), mask=mask)


@triton.jit
def _row_statistics_kernel(
    s_ptr,
    t_ptr,
    s_stride,
    t_stride,
    parts_ptr,
    n_cols,
    split_cols,
    student,
    teacher,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
    N_STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    start = split * split_cols
    stop = tl.minimum(start + split_cols, n_cols)
    offsets = (
        tl.arange(0, BLOCK_GROUPS)[:, None, None] * BLOCK_LANES
        + tl.arange(0, BLOCK_LANES)[None, :, None]
    )
    offsets = offsets * _WIDTH + tl.arange(0, _WIDTH)[None, None, :]

    s_top = tl.full([BLOCK_LANES], -float("inf"), tl.float32)
    t_top = tl.full([BLOCK_LANES], -float("inf"), tl.float32)
    s_where = tl.zeros([BLOCK_LANES], tl.int32) + start
    t_where = tl.zeros([BLOCK_LANES], tl.int32) + start
    s_total = tl.zeros([BLOCK_LANES], tl.float32)
    t_total = tl.zeros([BLOCK_LANES], tl.float32)
    s_difference = tl.zeros([BLOCK_LANES], tl.float32)
    t_difference = tl.zeros([BLOCK_LANES], tl.float32)
    s_centred = tl.zeros([BLOCK_LANES], tl.float32)
    t_centred = tl.zeros([BLOCK_LANES], tl.float32)
    for block in range(start, stop, BLOCK_GROUPS * BLOCK_LANES * _WIDTH):
        s, _ = load_logits(s_row, block + offsets, stop, student)
        t, _ = load_logits(t_row, block + offsets, stop, teacher)
        difference = t - s
        s_state = (s_top, s_total, s_centred, s_difference, s_where)
        t_state = (t_top, t_total, t_centred, t_difference, t_where)
        s_top, s_total, s_centred, s_difference, s_where = _fold(s, difference, block, s_state)
        t_top, t_total, t_centred, t_difference, t_where = _fold(t, difference, block, t_state)

    s_state = (s_top, s_total, s_centred, s_difference, s_where)
    t_state = (t_top, t_total, t_centred, t_difference, t_where)
    store_statistics(
        parts_ptr + (row * tl.num_programs(1) + split) * N_STATS,
        _whole_row(s_row, offsets, stop, student, s_state),
        _whole_row(t_row, offsets, stop, teacher, t_state),
        None,
    )


def tile_stats(tile: Tile, spec: RowSpec) -> Tensor:
    """Statistics [n, splits, COLUMNS] of a tile of classes."""
    n, classes = tile.s.shape
    groups, warps = STATISTICS_BLOCK
    lanes = warps * threads_of_a_warp(tile.s.device)
    splits, columns = split_columns(n, classes, groups * lanes * _WIDTH.value)
    parts = torch.empty(n, splits, COLUMNS, dtype=torch.float32, device=tile.s.device)
    if n:
        launch(_row_statistics_kernel, (n, splits), tile.s)(
            *logits_arguments(tile),
            parts,
            n_cols=classes,
            split_cols=columns,
            BLOCK_GROUPS=groups,
            BLOCK_LANES=lanes,
            N_STATS=COLUMNS,
            num_warps=warps,
            **transform_arguments(tile, spec),
        )
    return parts


def logits_arguments(tile: Tile) -> tuple[Tensor, Tensor, int, int]:
    """The first arguments of every pass: both models' logits and the strides of their rows."""
    return tile.s, tile.t, tile.s.stride(0), tile.t.stride(0)


def transform_arguments(tile: Tile, spec: RowSpec) -> dict[str, Any]:
    """The transforms of both models' logits."""
    return {
        "student": spec.student.kernel_argument(tile.student_bias),
        "teacher": spec.teacher.kernel_argument(tile.teacher_bias),
    }
