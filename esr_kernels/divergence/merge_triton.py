"""What follows the passes over the logits, in Triton: a few numbers a row, one lane a row.

merge          Parts of rows -> statistics of whole rows and, where the divergence follows from
               them, its value and its sum of pulls. `statistics.merge_parts` and `mixed_kl`
               specify it; as PyTorch operations it would be 41 launches.
cross-entropy  The label's logit is one dot product a row, from hidden states and head.

Both are launches of a few microseconds: bytes are 40 a part and 48 a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.launch import ceil_div, launch
from esr_kernels.common.logits_triton import transform_logits
from esr_kernels.divergence.statistics import (
    COLUMNS,
    IGNORED_LABEL,
    RowSpec,
    RowStats,
)

# (rows in a program, warps): a lane a row, so that a chunk of 1,024 rows still is 16 programs.
MERGE_BLOCK = (64, 2)
# (columns of the hidden state at a time, warps): 8 elements of a 16-bit type a lane.
LABEL_BLOCK = (1024, 4)

_IGNORED = tl.constexpr(IGNORED_LABEL)


@triton.jit
def _highest_part(part, n_parts, live, N_STATS: tl.constexpr):
    """(maximum, number, argmax) of the first part that has a row's maximum, of one model."""
    top = tl.load(part, mask=live, other=0.0)
    where = tl.load(part + 8, mask=live, other=0.0)
    number = tl.zeros_like(where)
    for i in range(1, n_parts):
        here = tl.load(part + i * N_STATS, mask=live, other=0.0)
        class_here = tl.load(part + i * N_STATS + 8, mask=live, other=0.0)
        where = tl.where(here > top, class_here, where)
        number = tl.where(here > top, 1.0 * i, number)
        top = tl.maximum(here, top)
    return top, number, where


@triton.jit
def _merge_model(part, top, n_parts, live, N_STATS: tl.constexpr):
    """(log-sum, mean difference, centred mean) of one model's parts, weighed by their shares."""
    total = tl.zeros_like(top)
    for i in range(n_parts):
        at = part + i * N_STATS
        below = tl.load(at, mask=live, other=0.0) - top
        total += tl.exp(below + tl.load(at + 2, mask=live, other=0.0))
    difference = tl.zeros_like(top)
    centred = tl.zeros_like(top)
    for i in range(n_parts):
        at = part + i * N_STATS
        below = tl.load(at, mask=live, other=0.0) - top
        share = tl.exp(below + tl.load(at + 2, mask=live, other=0.0)) / total
        mean_difference = tl.load(at + 4, mask=live, other=0.0)
        mean_centred = tl.load(at + 6, mask=live, other=0.0)
        difference += tl.where(share == 0, 0.0, share * mean_difference)
        centred += tl.where(share == 0, 0.0, share * (mean_centred + below))
    return tl.log(total), difference, centred


@triton.jit
def _rounded_sum(a, b):
    """(a + b rounded, what rounding left out): Knuth's two-sum, whichever is the larger."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


@triton.jit
def _merge_kernel(
    parts_ptr,
    out_ptr,
    label_ptr,
    label_weight,
    n_rows,
    n_parts,
    parameters,
    MIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    N_STATS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < n_rows
    part = parts_ptr + rows.to(tl.int64) * n_parts * N_STATS
    s_top, s_part, s_class = _highest_part(part, n_parts, live, N_STATS)
    t_top, t_part, t_class = _highest_part(part + 1, n_parts, live, N_STATS)
    s_log_sum, s_difference, s_centred = _merge_model(part, s_top, n_parts, live, N_STATS)
    t_log_sum, t_difference, t_centred = _merge_model(part + 1, t_top, n_parts, live, N_STATS)
    s_lse, s_residual = _rounded_sum(s_top, s_log_sum)
    t_lse, t_residual = _rounded_sum(t_top, t_log_sum)
    lse_difference = (s_top - t_top) + (s_log_sum - t_log_sum)
    agreement = ((s_part == t_part) & (s_class == t_class)).to(tl.float32)
    out = out_ptr + rows
    tl.store(out, s_lse, mask=live)
    tl.store(out + n_rows, t_lse, mask=live)
    tl.store(out + 2 * n_rows, lse_difference, mask=live)
    tl.store(out + 3 * n_rows, s_difference, mask=live)
    tl.store(out + 4 * n_rows, t_difference, mask=live)
    tl.store(out + 5 * n_rows, s_log_sum - s_centred, mask=live)
    tl.store(out + 6 * n_rows, t_log_sum - t_centred, mask=live)
    tl.store(out + 7 * n_rows, agreement, mask=live)
    tl.store(out + 8 * n_rows, s_residual, mask=live)
    tl.store(out + 9 * n_rows, t_residual, mask=live)
    if MIXED:
        # A term of weight 0 is left out: where a model lacks a class it is infinite.
        forward, reverse = parameters
        value = tl.zeros_like(s_top)
        pull_sum = tl.zeros_like(s_top)
        if reverse is not None:
            value -= reverse * (s_difference + lse_difference)
            pull_sum -= reverse * s_difference
        if forward is not None:
            value += forward * (t_difference + lse_difference)
            pull_sum -= forward
        if label_ptr is not None:
            label = tl.load(label_ptr + rows, mask=live, other=_IGNORED)
            pull_sum -= tl.where(label != _IGNORED, label_weight, 0.0)
        tl.store(out + 10 * n_rows, value, mask=live)
        tl.store(out + 11 * n_rows, pull_sum, mask=live)


def merge_rows(
    parts: Tensor, labels: Tensor | None, spec: RowSpec
) -> tuple[RowStats, Tensor | None, Tensor | None]:
    """`statistics.merge_rows` in one launch."""
    n, n_parts, _ = parts.shape
    mix = spec.divergence.kl_weights
    fields = len(RowStats._fields) + (0 if mix is None else 2)
    out = parts.new_empty(fields, n)
    block, warps = MERGE_BLOCK
    if n:
        launch(_merge_kernel, (ceil_div(n, block),), parts)(
            parts.contiguous(),
            out,
            labels,
            float(spec.label_weight),
            n_rows=n,
            n_parts=n_parts,
            parameters=(None, None) if mix is None else (mix[0] or None, mix[1] or None),
            MIXED=mix is not None,
            BLOCK=block,
            N_STATS=COLUMNS,
            num_warps=warps,
        )
    rows = out.unbind()
    value, pull_sum = (None, None) if mix is None else rows[-2:]
    return RowStats(*rows[: len(RowStats._fields)]), value, pull_sum


@triton.jit
def _cross_entropy_kernel(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    ids_ptr,
    label_ptr,
    lse_ptr,
    out_ptr,
    n_classes,
    depth,
    transform,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    exists = (label >= 0) & (label < n_classes)
    label_class = tl.where(exists, label, 0)
    head_row = label_class
    if ids_ptr is not None:
        head_row = tl.load(ids_ptr + label_class)
    hidden_ptr += row * hidden_stride
    weight_ptr += head_row * weight_stride
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        inside = start + lane < depth
        h = tl.load(hidden_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        total += h * w
    logit, _ = transform_logits(tl.sum(total, 0), label_class, exists, transform)
    entropy = tl.load(lse_ptr + row) - logit
    # A label that is no class, which the argument checks do not see on a GPU.
    entropy = tl.where(exists, entropy, tl.where(label == _IGNORED, 0.0, float("nan")))
    tl.store(out_ptr + row, entropy)


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    spec: RowSpec,
) -> Tensor:
    """-log p(label) [n]: 0 where there is no label, NaN where it is no class of `weight[ids]`."""
    n, depth = hidden.shape
    out = torch.empty(n, dtype=torch.float32, device=hidden.device)
    block, warps = LABEL_BLOCK
    if n:
        launch(_cross_entropy_kernel, (n,), hidden)(
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            ids,
            labels,
            lse,
            out,
            n_classes=(weight if ids is None else ids).shape[0],
            depth=depth,
            transform=spec.student.kernel_argument(bias),
            BLOCK=min(block, triton.next_power_of_2(depth)),
            num_warps=warps,
        )
    return out
