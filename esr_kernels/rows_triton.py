"""Row passes in Triton: the GPU path, with the signatures of `rows_torch`.

statistics  One program per (token, split of the row) folds blocks of both models' logits into ten
            statistics: fp32 accumulators stay lane-wise in registers, only the two maxima are
            reduced per block. Reads 8 bytes an element.
pull sums   The second pass of JSD and the like: two sums. Reads 8 bytes an element.
gradient    One program per (token, block): reads 8 bytes an element, writes dz in its dtype.

A row is split over programs when there are too few tokens to fill the machine; parts merge in a
fixed order (`row_stats.merge_parts`), so a launch repeats bit for bit. Logits beyond the classes
load as -inf. Offsets of rows are 64-bit: T * V passes 2**31 at 14,135 tokens of a Qwen vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.divergences import JSD, Divergence
from esr_kernels.row_stats import COLUMNS, RowSpec, RowStats, merge_parts, mixed_kl

# (columns in a block, warps): 8 columns a thread keep the ten accumulators and both loads in
# registers; wider blocks spill.
STATISTICS_BLOCK = (2048, 8)
PULL_SUMS_BLOCK = (2048, 8)
GRADIENT_BLOCK = (2048, 4)
# Programs that fill a large GPU a few times over.
_WANTED_PROGRAMS = 1024

_KL_MIX, _JSD = 0, 1


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) loses all digits near 0, where the series is exact to fp32.
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * 62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _load_logits(
    row_ptr,
    bias_ptr,
    columns,
    n_cols,
    scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Transformed logits of a block, -inf beyond the classes; and tanh of the softcap."""
    inside = columns < n_cols
    z = tl.load(row_ptr + columns, mask=inside, other=-float("inf"))
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    capped = z
    if HAS_SOFTCAP:
        capped = _tanh(z / softcap)
        z = capped * softcap
    return tl.where(inside, z * inv_temperature, -float("inf")), capped


@triton.jit
def _row_statistics_kernel(
    s_ptr,
    t_ptr,
    s_stride,
    t_stride,
    s_bias_ptr,
    t_bias_ptr,
    parts_ptr,
    n_cols,
    split_cols,
    first_class,
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
    BLOCK: tl.constexpr,
    N_STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    start = split * split_cols
    stop = tl.minimum(start + split_cols, n_cols)
    lane = tl.arange(0, BLOCK)

    s_max, t_max = -float("inf"), -float("inf")
    s_sum = tl.zeros([BLOCK], tl.float32)
    t_sum = tl.zeros([BLOCK], tl.float32)
    s_gap = tl.zeros([BLOCK], tl.float32)
    t_gap = tl.zeros([BLOCK], tl.float32)
    s_centred = tl.zeros([BLOCK], tl.float32)
    t_centred = tl.zeros([BLOCK], tl.float32)
    s_best = tl.full([BLOCK], -float("inf"), tl.float32)
    t_best = tl.full([BLOCK], -float("inf"), tl.float32)
    s_where = tl.zeros([BLOCK], tl.int32)
    t_where = tl.zeros([BLOCK], tl.int32)
    for block in range(start, stop, BLOCK):
        columns = block + lane
        s, _ = _load_logits(
            s_row,
            s_bias_ptr,
            columns,
            stop,
            s_scale,
            s_softcap,
            s_inv_temperature,
            S_BIAS,
            S_SOFTCAP,
        )
        t, _ = _load_logits(
            t_row,
            t_bias_ptr,
            columns,
            stop,
            t_scale,
            t_softcap,
            t_inv_temperature,
            T_BIAS,
            T_SOFTCAP,
        )
        s_where = tl.where(s > s_best, columns, s_where)
        t_where = tl.where(t > t_best, columns, t_where)
        s_best = tl.maximum(s, s_best)
        t_best = tl.maximum(t, t_best)
        s_new = tl.maximum(s_max, tl.max(s, 0))
        t_new = tl.maximum(t_max, tl.max(t, 0))
        # A block of -inf only must not turn into exp(-inf + inf).
        s_base = tl.where(s_new == -float("inf"), 0.0, s_new)
        t_base = tl.where(t_new == -float("inf"), 0.0, t_new)
        s_decay, t_decay = tl.exp(s_max - s_base), tl.exp(t_max - t_base)
        # What the sums of p * (s - max) owe for the maximum that moved.
        s_shift = tl.where(s_max == -float("inf"), 0.0, s_max - s_base)
        t_shift = tl.where(t_max == -float("inf"), 0.0, t_max - t_base)
        s_max, t_max = s_new, t_new
        p, q = tl.exp(s - s_base), tl.exp(t - t_base)
        gap = t - s
        # 0 * inf: a class of probability 0 weighs nothing whatever its logit.
        s_centred = (s_centred + s_shift * s_sum) * s_decay + tl.where(
            p == 0, 0.0, p * (s - s_base)
        )
        t_centred = (t_centred + t_shift * t_sum) * t_decay + tl.where(
            q == 0, 0.0, q * (t - t_base)
        )
        s_sum = s_sum * s_decay + p
        t_sum = t_sum * t_decay + q
        s_gap = s_gap * s_decay + tl.where(p == 0, 0.0, p * gap)
        t_gap = t_gap * t_decay + tl.where(q == 0, 0.0, q * gap)

    s_total, t_total = tl.sum(s_sum, 0), tl.sum(t_sum, 0)
    s_norm = tl.where(s_total == 0, 1.0, s_total)
    t_norm = tl.where(t_total == 0, 1.0, t_total)
    # The first class that attains the maximum, as torch.argmax on CPU has it.
    s_first = tl.min(tl.where(s_best == s_max, s_where, n_cols), 0)
    t_first = tl.min(tl.where(t_best == t_max, t_where, n_cols), 0)
    # The order of row_stats' columns.
    out = parts_ptr + (row * tl.num_programs(1) + split) * N_STATS
    tl.store(out + 0, s_max)
    tl.store(out + 1, t_max)
    tl.store(out + 2, tl.log(s_total))
    tl.store(out + 3, tl.log(t_total))
    tl.store(out + 4, tl.sum(s_gap, 0) / s_norm)
    tl.store(out + 5, tl.sum(t_gap, 0) / t_norm)
    tl.store(out + 6, tl.sum(s_centred, 0) / s_norm)
    tl.store(out + 7, tl.sum(t_centred, 0) / t_norm)
    tl.store(out + 8, (s_first + first_class).to(tl.float32))
    tl.store(out + 9, (t_first + first_class).to(tl.float32))


@triton.jit
def _log_p_over_m(gap, beta):
    return -tl.log(1.0 + beta * (tl.exp(gap) - 1.0))


@triton.jit
def _clamped_gap(s, t, lse_gap, p, q):
    gap = tl.minimum(tl.maximum(t - s + lse_gap, -80.0), 80.0)
    return tl.where((p == 0) & (q == 0), 0.0, gap)


@triton.jit
def _pull_sums_kernel(
    s_ptr,
    t_ptr,
    s_stride,
    t_stride,
    s_bias_ptr,
    t_bias_ptr,
    s_lse_ptr,
    t_lse_ptr,
    lse_gap_ptr,
    sums_ptr,
    n_cols,
    split_cols,
    beta,
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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
    s_lse, t_lse = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row)
    lse_gap = tl.load(lse_gap_ptr + row)
    start = split * split_cols
    stop = tl.minimum(start + split_cols, n_cols)
    lane = tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    pull = tl.zeros([BLOCK], tl.float32)
    for block in range(start, stop, BLOCK):
        columns = block + lane
        s, _ = _load_logits(
            s_row,
            s_bias_ptr,
            columns,
            stop,
            s_scale,
            s_softcap,
            s_inv_temperature,
            S_BIAS,
            S_SOFTCAP,
        )
        t, _ = _load_logits(
            t_row,
            t_bias_ptr,
            columns,
            stop,
            t_scale,
            t_softcap,
            t_inv_temperature,
            T_BIAS,
            T_SOFTCAP,
        )
        p, q = tl.exp(s - s_lse), tl.exp(t - t_lse)
        gap = _clamped_gap(s, t, lse_gap, p, q)
        log_p_over_m = _log_p_over_m(gap, beta)
        mine = (1.0 - beta) * p * log_p_over_m
        pull += mine
        value += mine + beta * q * (gap + log_p_over_m)
    out = sums_ptr + (row * tl.num_programs(1) + split) * 2
    tl.store(out, tl.sum(value, 0))
    tl.store(out + 1, tl.sum(pull, 0))


@triton.jit
def _gradient_kernel(
    s_ptr,
    t_ptr,
    dz_ptr,
    s_stride,
    t_stride,
    dz_stride,
    s_bias_ptr,
    t_bias_ptr,
    s_lse_ptr,
    t_lse_ptr,
    lse_gap_ptr,
    pull_sum_ptr,
    weight_ptr,
    n_cols,
    forward,
    reverse,
    beta,
    s_scale,
    s_softcap,
    s_inv_temperature,
    t_scale,
    t_softcap,
    t_inv_temperature,
    KIND: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    HAS_REVERSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    S_BIAS: tl.constexpr,
    S_SOFTCAP: tl.constexpr,
    T_BIAS: tl.constexpr,
    T_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s_lse, t_lse = tl.load(s_lse_ptr + row), tl.load(t_lse_ptr + row)
    pull_sum = tl.load(pull_sum_ptr + row)
    s, capped = _load_logits(
        s_ptr + row * s_stride,
        s_bias_ptr,
        columns,
        n_cols,
        s_scale,
        s_softcap,
        s_inv_temperature,
        S_BIAS,
        S_SOFTCAP,
    )
    t, _ = _load_logits(
        t_ptr + row * t_stride,
        t_bias_ptr,
        columns,
        n_cols,
        t_scale,
        t_softcap,
        t_inv_temperature,
        T_BIAS,
        T_SOFTCAP,
    )
    p = tl.exp(s - s_lse)
    if KIND == 0:  # forward * KL(q||p) + reverse * KL(p||q), in the unnormalised gap
        dz = -p * pull_sum
        if HAS_REVERSE:
            dz = tl.where(p == 0, 0.0, -p * (reverse * (t - s) + pull_sum))
        if HAS_FORWARD:
            dz -= forward * tl.exp(t - t_lse)
    else:  # JSD(beta)
        q = tl.exp(t - t_lse)
        gap = _clamped_gap(s, t, tl.load(lse_gap_ptr + row), p, q)
        dz = p * ((1.0 - beta) * _log_p_over_m(gap, beta) - pull_sum)
    if S_SOFTCAP:
        dz *= 1.0 - capped * capped
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row)
        dz = tl.where(weight == 0, 0.0, dz * weight)
    out = dz_ptr + row * dz_stride + columns
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=columns < n_cols)


def _transform_arguments(
    spec: RowSpec, student_bias: Tensor | None, teacher_bias: Tensor | None
) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for prefix, transform, bias in (
        ("s", spec.student, student_bias),
        ("t", spec.teacher, teacher_bias),
    ):
        arguments[f"{prefix}_scale"] = float(transform.scale)
        arguments[f"{prefix}_softcap"] = float(transform.softcap or 1.0)
        arguments[f"{prefix}_inv_temperature"] = 1.0 / transform.temperature
        arguments[f"{prefix.upper()}_SOFTCAP"] = transform.softcap is not None
        arguments[f"{prefix}_bias_ptr"] = bias
        arguments[f"{prefix.upper()}_BIAS"] = bias is not None
    return arguments


def _split_columns(rows: int, classes: int, block: int) -> tuple[int, int]:
    """(splits of a row, columns in each): enough programs for the machine, whole blocks each."""
    blocks = triton.cdiv(classes, block)
    splits = min(blocks, max(1, _WANTED_PROGRAMS // max(rows, 1)))
    columns = triton.cdiv(blocks, splits) * block
    return triton.cdiv(classes, columns), columns


def _beta(divergence: Divergence) -> float:
    if isinstance(divergence, JSD):
        return divergence.beta
    raise TypeError(
        f"the Triton row passes know mixes of the two KLs and JSD, got {divergence!r}; "
        "use impl='torch'"
    )


def tile_stats(
    s: Tensor,
    t: Tensor,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    first_class: int = 0,
) -> Tensor:
    """Statistics [n, splits, COLUMNS] of a tile of classes."""
    n, classes = s.shape
    block, warps = STATISTICS_BLOCK
    splits, columns = _split_columns(n, classes, block)
    parts = torch.empty(n, splits, COLUMNS, dtype=torch.float32, device=s.device)
    if n:
        _row_statistics_kernel[(n, splits)](
            s,
            t,
            s.stride(0),
            t.stride(0),
            parts_ptr=parts,
            n_cols=classes,
            split_cols=columns,
            first_class=first_class,
            BLOCK=block,
            N_STATS=COLUMNS,
            num_warps=warps,
            **_transform_arguments(spec, student_bias, teacher_bias),
        )
    return parts


def tile_pull_sums(
    s: Tensor,
    t: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    lse_gap: Tensor,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> Tensor:
    """(sum of summands, sum of pulls) [n, 2] over a tile, for divergences that take two passes."""
    n, classes = s.shape
    block, warps = PULL_SUMS_BLOCK
    splits, columns = _split_columns(n, classes, block)
    sums = torch.empty(n, splits, 2, dtype=torch.float32, device=s.device)
    if n:
        _pull_sums_kernel[(n, splits)](
            s,
            t,
            s.stride(0),
            t.stride(0),
            s_lse_ptr=student_lse.contiguous(),
            t_lse_ptr=teacher_lse.contiguous(),
            lse_gap_ptr=lse_gap.contiguous(),
            sums_ptr=sums,
            n_cols=classes,
            split_cols=columns,
            beta=_beta(spec.divergence),
            BLOCK=block,
            num_warps=warps,
            **_transform_arguments(spec, student_bias, teacher_bias),
        )
    return sums.sum(1)


def tile_gradient_(
    s: Tensor,
    t: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
    lse_gap: Tensor,
    pull_sum: Tensor,
    row_weight: Tensor | None,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    dz: Tensor,
) -> None:
    """Write dz [n, V] of a tile whose rows' statistics are known; `dz` may be `s`."""
    n, classes = s.shape
    mix = spec.divergence.kl_weights
    forward, reverse = mix or (0.0, 0.0)
    block, warps = GRADIENT_BLOCK
    if n:
        _gradient_kernel[(n, triton.cdiv(classes, block))](
            s,
            t,
            dz,
            s.stride(0),
            t.stride(0),
            dz.stride(0),
            s_lse_ptr=student_lse.contiguous(),
            t_lse_ptr=teacher_lse.contiguous(),
            lse_gap_ptr=lse_gap.contiguous(),
            pull_sum_ptr=pull_sum.contiguous(),
            weight_ptr=row_weight,
            n_cols=classes,
            forward=float(forward),
            reverse=float(reverse),
            beta=0.0 if mix is not None else _beta(spec.divergence),
            KIND=_JSD if mix is None else _KL_MIX,
            HAS_FORWARD=forward != 0,
            HAS_REVERSE=reverse != 0,
            HAS_WEIGHT=row_weight is not None,
            BLOCK=block,
            num_warps=warps,
            **_transform_arguments(spec, student_bias, teacher_bias),
        )


def stash_rows_(
    s: Tensor,
    t: Tensor,
    row_weight: Tensor | None,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    dz: Tensor,
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `s`."""
    biases = student_bias, teacher_bias
    stats = merge_parts(tile_stats(s, t, spec, *biases))
    lse = stats.student_lse, stats.teacher_lse, stats.lse_gap
    mix = spec.divergence.kl_weights
    if mix is not None:
        value, pull_sum = mixed_kl(stats, *mix)
    else:
        value, pull_sum = tile_pull_sums(s, t, *lse, spec, *biases).unbind(1)
    tile_gradient_(s, t, *lse, pull_sum, row_weight, spec, *biases, dz)
    return value, stats
