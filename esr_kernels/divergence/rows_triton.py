"""Row passes in Triton: the GPU path, with the signatures of `rows_torch`.

statistics  One program per (token, split of the row) reduces both models' logits to ten numbers.
            Reads 8 bytes an element.
pull sums   The second pass of divergences such as JSD: three sums. Reads 8 bytes an element.
gradient    One program per (token, block): reads 8 bytes an element, writes dz in its dtype.

Each pass streams blocks of both models' logits through registers; fp32 accumulators and the running
maxima stay per lane, and are reduced once a row. A row is split over programs when there are too
few tokens to fill the machine; parts merge in a fixed order (`statistics.merge_parts`), so a launch
repeats bit for bit. Offsets of rows are 64-bit: T * V passes 2**31 at 14,135 tokens of a Qwen
vocabulary. Transforms are tuples, see `logits_triton.transform_logits`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import ceil_div, launch, split_columns
from esr_kernels.common.logits_triton import lane_max, load_logits, merge_lanes, online_softmax
from esr_kernels.common.projection_triton import threads_of_a_warp
from esr_kernels.divergence.losses import KernelForm
from esr_kernels.divergence.losses_triton import KL_MIX, log_ratio_of, summand_and_pull
from esr_kernels.divergence.merge_triton import merge_rows
from esr_kernels.divergence.statistics import (
    COLUMNS,
    RowNormalizers,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    row_normalizers,
    with_labels,
)

# A thread of the statistics loads groups of this many neighbouring logits, 128 bits.
_WIDTH = tl.constexpr(4)
# (groups of a thread, warps). Counted in the SASS of sm_90 at V = 151,936, without options: 42
# instructions a pair of logits and 48 registers, 40 of 64 warps resident. With 1 group 46 and 40,
# with 4 groups 39 and 79. Loads through shared memory (`num_stages`) take 47 and 63: the resident
# warps have 40 KiB in flight already, so they are not kept. Before Triton 3.7, 2 groups take 49 and
# 64, and spill with all options; 1 group 46 and 40.
STATISTICS_BLOCK = (1 if triton.__version__.startswith(("3.4.", "3.5.", "3.6.")) else 2, 4)
# (columns in a block, warps): 8 columns a thread.
PULL_SUMS_BLOCK = (1024, 4)
GRADIENT_BLOCK = (1024, 4)
# The passes read raw logits and leave them as they are.
TRANSFORMS_IN_PLACE = False
_split = functools.lru_cache(1024)(split_columns)


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
    splits, columns = _split(n, classes, groups * lanes * _WIDTH.value)
    parts = torch.empty(n, splits, COLUMNS, dtype=torch.float32, device=tile.s.device)
    if n:
        launch(_row_statistics_kernel, (n, splits), tile.s)(
            *_logits(tile),
            parts,
            n_cols=classes,
            split_cols=columns,
            BLOCK_GROUPS=groups,
            BLOCK_LANES=lanes,
            N_STATS=COLUMNS,
            num_warps=warps,
            student=spec.student.kernel_argument(tile.student_bias),
            teacher=spec.teacher.kernel_argument(tile.teacher_bias),
        )
    return parts


@triton.jit
def _pull_sums_kernel(
    s_ptr,
    t_ptr,
    s_stride,
    t_stride,
    s_lse_ptr,
    t_lse_ptr,
    lse_difference_ptr,
    s_residual_ptr,
    t_residual_ptr,
    sums_ptr,
    n_cols,
    split_cols,
    parameter,
    student,
    teacher,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    s_lse, t_lse = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row)
    lse_difference = tl.load(lse_difference_ptr + row)
    # What rounding left out of the log-sum-exps is a factor of every probability of the row.
    p_factor, q_factor = (
        tl.exp(-tl.load(s_residual_ptr + row)),
        tl.exp(-tl.load(t_residual_ptr + row)),
    )
    start = split * split_cols
    stop = tl.minimum(start + split_cols, n_cols)
    lane = tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    pull = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for block in range(start, stop, BLOCK):
        columns = block + lane
        s, _ = load_logits(s_row, columns, stop, student)
        t, _ = load_logits(t_row, columns, stop, teacher)
        p, q = tl.exp(s - s_lse) * p_factor, tl.exp(t - t_lse) * q_factor
        log_ratio = log_ratio_of(s, t, lse_difference, p, q)
        summand, block_pull = summand_and_pull(p, q, log_ratio, parameter, KIND)
        value += summand
        pull += block_pull
        mass += p
    out = sums_ptr + (row * tl.num_programs(1) + split) * 3
    tl.store(out, tl.sum(value, 0))
    tl.store(out + 1, tl.sum(pull, 0))
    tl.store(out + 2, tl.sum(mass, 0))


def tile_pull_sums(tile: Tile, stats: RowStats, spec: RowSpec) -> Tensor:
    """Sums [n, 3] over a tile of summands, pulls and p, for divergences that take two passes."""
    n, classes = tile.s.shape
    block, warps = PULL_SUMS_BLOCK
    splits, columns = split_columns(n, classes, block)
    sums = torch.empty(n, splits, 3, dtype=torch.float32, device=tile.s.device)
    form = _form(spec)
    if n:
        launch(_pull_sums_kernel, (n, splits), tile.s)(
            *_logits(tile),
            stats.student_lse.contiguous(),
            stats.teacher_lse.contiguous(),
            stats.lse_difference.contiguous(),
            stats.student_residual.contiguous(),
            stats.teacher_residual.contiguous(),
            sums,
            n_cols=classes,
            split_cols=columns,
            parameter=form.a,
            KIND=int(form.kind),
            BLOCK=block,
            num_warps=warps,
            student=spec.student.kernel_argument(tile.student_bias),
            teacher=spec.teacher.kernel_argument(tile.teacher_bias),
        )
    return sums[:, 0] if splits == 1 else sums.sum(1)


@triton.jit
def _gradient_kernel(
    s_ptr,
    t_ptr,
    s_stride,
    t_stride,
    dz_ptr,
    dz_stride,
    s_lse_ptr,
    t_lse_ptr,
    lse_difference_ptr,
    pull_sum_ptr,
    s_residual_ptr,
    t_residual_ptr,
    weight_ptr,
    label_ptr,
    label_weight,
    n_cols,
    parameters,
    student,
    teacher,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_lse, t_lse = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row)
    pull_sum = tl.load(pull_sum_ptr + row)
    s, capped = load_logits(s_ptr + row * s_stride, columns, n_cols, student)
    t, _ = load_logits(t_ptr + row * t_stride, columns, n_cols, teacher)
    p = tl.exp(s - s_lse) * tl.exp(-tl.load(s_residual_ptr + row))
    if KIND == KL_MIX:  # forward * KL(q||p) + reverse * KL(p||q), without normalisation
        forward, reverse = parameters
        dz = -p * pull_sum
        if reverse is not None:
            dz = tl.where(p == 0, 0.0, -p * (reverse * (t - s) + pull_sum))
        if forward is not None:
            dz -= forward * tl.exp(-tl.load(t_residual_ptr + row)) * tl.exp(t - t_lse)
    else:
        q = tl.exp(t - t_lse) * tl.exp(-tl.load(t_residual_ptr + row))
        log_ratio = log_ratio_of(s, t, tl.load(lse_difference_ptr + row), p, q)
        _, pull = summand_and_pull(p, q, log_ratio, parameters[0], KIND)
        dz = pull - p * pull_sum
    if label_ptr is not None:
        # Before dz is rounded: p - 1 of a rounded p would lose all digits of a confident class.
        dz -= tl.where(columns == tl.load(label_ptr + row), label_weight, 0.0)
    if student[2] is not None:
        dz *= 1.0 - capped * capped
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + row)
        dz = tl.where(weight == 0, 0.0, dz * weight)
    out = dz_ptr + row * dz_stride + columns
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=columns < n_cols)


def tile_gradient_(
    tile: Tile, normalizers: RowNormalizers, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> None:
    """Write dz [n, V] of a tile, given its rows' normalizers; `dz` may be `tile.s`."""
    n, classes = tile.s.shape
    form = _form(spec)
    block, warps = GRADIENT_BLOCK
    if n:
        launch(_gradient_kernel, (n, ceil_div(classes, block)), tile.s)(
            *_logits(tile),
            dz,
            dz.stride(0),
            normalizers.student_lse.contiguous(),
            normalizers.teacher_lse.contiguous(),
            normalizers.lse_difference.contiguous(),
            normalizers.pull_sum.contiguous(),
            normalizers.student_residual.contiguous(),
            normalizers.teacher_residual.contiguous(),
            weight_ptr=row_weight,
            label_ptr=tile.labels,
            label_weight=float(spec.label_weight),
            n_cols=classes,
            parameters=(form.a or None, form.b or None),
            KIND=int(form.kind),
            BLOCK=block,
            num_warps=warps,
            student=spec.student.kernel_argument(tile.student_bias),
            teacher=spec.teacher.kernel_argument(tile.teacher_bias),
        )


def stash_rows_(
    tile: Tile, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `tile.s`."""
    stats, value, pull_sum = merge_rows(tile_stats(tile, spec), tile.labels, spec)
    if value is None or pull_sum is None:
        value, pull_sum = from_pull_sums(tile_pull_sums(tile, stats, spec))
        pull_sum = with_labels(pull_sum, tile.labels, spec)
    tile_gradient_(tile, row_normalizers(stats, pull_sum), row_weight, spec, dz)
    return value, stats


def _form(spec: RowSpec) -> KernelForm:
    if spec.form is None:
        raise TypeError(
            f"divergence: the Triton row passes do not know {spec.divergence!r}; use impl='torch'"
        )
    return spec.form


def _logits(tile: Tile) -> tuple[Tensor, Tensor, int, int]:
    """The first arguments of every pass: both models' logits and the strides of their rows."""
    return tile.s, tile.t, tile.s.stride(0), tile.t.stride(0)
