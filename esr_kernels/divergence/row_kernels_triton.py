"""Triton kernels over rows of logits: statistics, pull sums, gradient. Launched by `rows_triton`.

Each streams blocks of both models' logits through registers: fp32 accumulators stay lane-wise, only
the two running maxima are reduced per block. Logits beyond the classes load as -inf. Offsets of
rows are 64-bit: T * V passes 2**31 at 14,135 tokens of a Qwen vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) loses all digits near 0, where the series is exact to fp32.
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * 62.0 / 2835))))
    return tl.where(tl.abs(x) < 0.25, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _expm1(x):
    # exp(x) - 1 loses the digits of a small x; nearly equal models have nothing else.
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def _log1p(x):
    z = x / (2.0 + x)  # log1p(x) = 2 atanh(z)
    z2 = z * z
    series = 2.0 * z * (1.0 + z2 * (1.0 / 3 + z2 * (1.0 / 5 + z2 * (1.0 / 7))))
    return tl.where(tl.abs(x) < 0.25, series, tl.log(1.0 + x))


@triton.jit
def load_logits(
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
def row_statistics_kernel(
    s_ptr,
    t_ptr,
    s_stride,
    t_stride,
    s_bias_ptr,
    t_bias_ptr,
    parts_ptr,
    n_cols,
    split_cols,
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
        s, _ = load_logits(
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
        t, _ = load_logits(
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
    tl.store(out + 8, s_first.to(tl.float32))
    tl.store(out + 9, t_first.to(tl.float32))


@triton.jit
def _clamped_gap(s, t, lse_gap, p, q):
    """log q - log p within +-80; 0 where both probabilities are 0."""
    gap = tl.minimum(tl.maximum(t - s + lse_gap, -80.0), 80.0)
    return tl.where((p == 0) & (q == 0), 0.0, gap)


@triton.jit
def _summand_and_pull(p, q, gap, parameter, KIND: tl.constexpr):
    """The two functions of a divergence that takes two passes; see divergences.py."""
    if KIND == 1:  # JSD(beta)
        log_m = _log1p(parameter * _expm1(gap))
        pull = (parameter - 1.0) * p * log_m
        summand = pull + parameter * q * (gap - log_m)
    elif KIND == 2:  # SkewForwardKL(alpha)
        log_m = _log1p(parameter * _expm1(gap))
        pull = (parameter - 1.0) * q * tl.exp(-log_m)
        summand = q * (gap - log_m)
    elif KIND == 3:  # SkewReverseKL(alpha)
        log_m = _log1p((1.0 - parameter) * _expm1(gap))
        pull = -p * (log_m + parameter * _expm1(-log_m))
        summand = -p * log_m
    else:  # TotalVariation
        pull = -0.5 * p * ((gap > 0).to(tl.float32) - (gap < 0).to(tl.float32))
        summand = 0.5 * tl.abs(p - q)
    return summand, pull


@triton.jit
def pull_sums_kernel(
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
    parameter,
    s_scale,
    s_softcap,
    s_inv_temperature,
    t_scale,
    t_softcap,
    t_inv_temperature,
    KIND: tl.constexpr,
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
    mass = tl.zeros([BLOCK], tl.float32)
    for block in range(start, stop, BLOCK):
        columns = block + lane
        s, _ = load_logits(
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
        t, _ = load_logits(
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
        summand, mine = _summand_and_pull(p, q, gap, parameter, KIND)
        value += summand
        pull += mine
        mass += p
    out = sums_ptr + (row * tl.num_programs(1) + split) * 3
    tl.store(out, tl.sum(value, 0))
    tl.store(out + 1, tl.sum(pull, 0))
    tl.store(out + 2, tl.sum(mass, 0))


@triton.jit
def gradient_kernel(
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
    label_ptr,
    n_cols,
    forward,
    reverse,
    parameter,
    label_weight,
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
    HAS_LABELS: tl.constexpr,
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
    s, capped = load_logits(
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
    t, _ = load_logits(
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
    else:
        q = tl.exp(t - t_lse)
        gap = _clamped_gap(s, t, tl.load(lse_gap_ptr + row), p, q)
        _, pull = _summand_and_pull(p, q, gap, parameter, KIND)
        dz = pull - p * pull_sum
    if HAS_LABELS:
        # Before dz is rounded: p - 1 of a rounded p would lose all digits of a confident class.
        dz -= tl.where(columns == tl.load(label_ptr + row), label_weight, 0.0)
    if S_SOFTCAP:
        dz *= 1.0 - capped * capped
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + row)
        dz = tl.where(weight == 0, 0.0, dz * weight)
    out = dz_ptr + row * dz_stride + columns
    tl.store(out, dz.to(dz_ptr.dtype.element_ty), mask=columns < n_cols)
