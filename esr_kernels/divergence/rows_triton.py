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

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import launch, split_columns
from esr_kernels.common.logits_triton import (
    expm1,
    load_logits,
    log1p,
)
from esr_kernels.divergence.losses import Divergence, KernelForm, KernelKind, kernel_form
from esr_kernels.divergence.merge_triton import merge_rows
from esr_kernels.divergence.row_statistics_triton import (
    logits_arguments,
    tile_stats,
    transform_arguments,
)
from esr_kernels.divergence.statistics import (
    RowNormalizers,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    row_normalizers,
    with_labels,
)

# (columns in a block, warps): 8 columns a thread.
PULL_SUMS_BLOCK = (1024, 4)
GRADIENT_BLOCK = (1024, 4)
# The passes read raw logits and leave them as they are.
TRANSFORMS_IN_PLACE = False

_JSD = tl.constexpr(KernelKind.JSD.value)
_SKEW_FORWARD_KL = tl.constexpr(KernelKind.SKEW_FORWARD_KL.value)
_SKEW_REVERSE_KL = tl.constexpr(KernelKind.SKEW_REVERSE_KL.value)
_KL_MIX = tl.constexpr(KernelKind.KL_MIX.value)


@triton.jit
def _log_ratio(s, t, lse_difference, p, q):
    """log q - log p within +-80; 0 where both probabilities are 0."""
    log_ratio = tl.minimum(tl.maximum(t - s + lse_difference, -80.0), 80.0)
    return tl.where((p == 0) & (q == 0), 0.0, log_ratio)


@triton.jit
def _summand_and_pull(p, q, log_ratio, parameter, KIND: tl.constexpr):
    """The two functions of a divergence that takes two passes, as in `losses`."""
    if KIND == _JSD:
        log_m = log1p(parameter * expm1(log_ratio))
        pull = (parameter - 1.0) * p * log_m
        summand = pull + parameter * q * (log_ratio - log_m)
    elif KIND == _SKEW_FORWARD_KL:
        log_m = log1p(parameter * expm1(log_ratio))
        pull = (parameter - 1.0) * q * tl.exp(-log_m)
        summand = q * (log_ratio - log_m)
    elif KIND == _SKEW_REVERSE_KL:
        log_m = log1p((1.0 - parameter) * expm1(log_ratio))
        pull = -p * (log_m + parameter * expm1(-log_m))
        summand = -p * log_m
    else:  # TotalVariation
        pull = -0.5 * p * ((log_ratio > 0).to(tl.float32) - (log_ratio < 0).to(tl.float32))
        summand = 0.5 * tl.abs(p - q)
    return summand, pull


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
        log_ratio = _log_ratio(s, t, lse_difference, p, q)
        summand, block_pull = _summand_and_pull(p, q, log_ratio, parameter, KIND)
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
    form = _form(spec.divergence)
    if n:
        launch(_pull_sums_kernel, (n, splits), tile.s)(
            *logits_arguments(tile),
            stats.student_lse.contiguous(),
            stats.teacher_lse.contiguous(),
            stats.lse_difference.contiguous(),
            stats.student_residual.contiguous(),
            stats.teacher_residual.contiguous(),
            sums,
            n_cols=classes,
            split_cols=columns,
            parameter=form.a,
            KIND=form.kind.value,
            BLOCK=block,
            num_warps=warps,
            **transform_arguments(tile, spec),
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
    if KIND == _KL_MIX:  # forward * KL(q||p) + reverse * KL(p||q), without normalisation
        forward, reverse = parameters
        dz = -p * pull_sum
        if reverse is not None:
            dz = tl.where(p == 0, 0.0, -p * (reverse * (t - s) + pull_sum))
        if forward is not None:
            dz -= forward * tl.exp(-tl.load(t_residual_ptr + row)) * tl.exp(t - t_lse)
    else:
        q = tl.exp(t - t_lse) * tl.exp(-tl.load(t_residual_ptr + row))
        log_ratio = _log_ratio(s, t, tl.load(lse_difference_ptr + row), p, q)
        _, pull = _summand_and_pull(p, q, log_ratio, parameters[0], KIND)
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
    form = _form(spec.divergence)
    block, warps = GRADIENT_BLOCK
    if n:
        launch(_gradient_kernel, (n, triton.cdiv(classes, block)), tile.s)(
            *logits_arguments(tile),
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
            KIND=form.kind.value,
            BLOCK=block,
            num_warps=warps,
            **transform_arguments(tile, spec),
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


def _form(divergence: Divergence) -> KernelForm:
    form = kernel_form(divergence)
    if form is None:
        raise TypeError(
            f"divergence: the Triton row passes do not know {divergence!r}; use impl='torch'"
        )
    return form
