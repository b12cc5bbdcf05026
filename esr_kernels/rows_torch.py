"""Row passes in PyTorch: the CPU path.

Every function takes fp32 (or fp64) raw logits `s`, `t` [n, V] and may overwrite them. Rows go
through in blocks that stay in the cache: the passes below touch a block about ten times, main
memory three times. softmax() is used where exp() would do, since its vectorised exponential is
faster and it takes the maximum along; the log-sum-exp falls out as max - log(max probability).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from esr_kernels.row_stats import (
    ARGMAX,
    CENTRED,
    COLUMNS,
    GAP,
    LOG_SUM,
    MAX,
    LogitTransform,
    RowSpec,
    RowStats,
    merge_parts,
    mixed_kl,
)

# Elements of one block: two logit blocks and two probability blocks should fit in a shared cache.
_BLOCK_ELEMENTS = 1 << 20
_ARGMAX_WIDTH = 512


def _row_blocks(rows: int, classes: int) -> Iterator[slice]:
    threads = torch.get_num_threads()
    height = max(1, _BLOCK_ELEMENTS // max(classes, 1) // threads) * threads
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _apply_transform_(z: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    if bias is not None:
        z.add_(bias)
    if transform.softcap is not None:
        z.mul_(transform.scale / transform.softcap).tanh_()
        z.mul_(transform.softcap / transform.temperature)
    elif transform.slope != 1.0:
        z.mul_(transform.slope)


def _argmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(max, first argmax) of each row, by strips: torch's max with indices is not vectorised."""
    n, classes = z.shape
    whole = classes // _ARGMAX_WIDTH * _ARGMAX_WIDTH
    tops = []
    if whole:
        tops.append(z[:, :whole].unflatten(1, (-1, _ARGMAX_WIDTH)).amax(-1))
    if whole < classes:
        tops.append(z[:, whole:].amax(-1, keepdim=True))
    top, strip = torch.cat(tops, dim=1).max(dim=1)
    columns = strip[:, None] * _ARGMAX_WIDTH + torch.arange(
        min(_ARGMAX_WIDTH, classes), device=z.device
    )
    inside = columns < classes
    candidates = z.gather(1, columns.clamp(max=classes - 1))
    offset = torch.where(inside, candidates, -torch.inf).argmax(1)
    return top, strip * _ARGMAX_WIDTH + offset


def _block_statistics(
    s: Tensor, t: Tensor, p: Tensor, q: Tensor, scratch: Tensor, parts: Tensor
) -> Tensor:
    """Fill `parts` [n, COLUMNS] from a block of transformed logits and their softmaxes.

    Returns the gap t - s, written over `t`.
    """
    for column, z, probability in ((0, s, p), (1, t, q)):
        top, argmax = _argmax(z)
        parts[:, MAX][:, column] = top
        parts[:, ARGMAX][:, column] = argmax
        parts[:, LOG_SUM][:, column] = probability.amax(1).log().neg()
        centred = torch.sub(z, top[:, None], out=scratch)
        parts[:, CENTRED][:, column] = _weighted_sum(probability, centred)
    gap = t.sub_(s)
    parts[:, GAP][:, 0] = _weighted_sum(p, gap)
    parts[:, GAP][:, 1] = _weighted_sum(q, gap)
    return gap


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    total = torch.linalg.vecdot(weights, values)
    # 0 * inf: a class of probability 0 counts 0 whatever its logit. Look only when it shows.
    if not bool(total.isfinite().all()):
        total = torch.where(weights > 0, weights * values, 0.0).sum(1)
    return total


def tile_stats(
    s: Tensor,
    t: Tensor,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    first_class: int = 0,
) -> Tensor:
    """Statistics [n, 1, COLUMNS] of a tile of classes; overwrites the logits."""
    parts = torch.empty(s.shape[0], 1, COLUMNS, dtype=s.dtype)
    for rows in _row_blocks(*s.shape):
        s_rows, t_rows = s[rows], t[rows]
        _apply_transform_(s_rows, student_bias, spec.student)
        _apply_transform_(t_rows, teacher_bias, spec.teacher)
        p, q = s_rows.softmax(1), t_rows.softmax(1)
        _block_statistics(s_rows, t_rows, p, q, torch.empty_like(p), parts[rows, 0])
    parts[:, 0, ARGMAX] += first_class
    return parts


def _gap_(s: Tensor, t: Tensor, p: Tensor, q: Tensor, lse_gap: Tensor) -> Tensor:
    """log q - log p in place of `t`; 0 where both are 0."""
    gap = t.sub_(s).add_(lse_gap[:, None])
    return gap.masked_fill_((p == 0) & (q == 0), 0.0)


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
    sums = torch.empty(s.shape[0], 2, dtype=s.dtype)
    for rows in _row_blocks(*s.shape):
        s_rows, t_rows = s[rows], t[rows]
        _apply_transform_(s_rows, student_bias, spec.student)
        _apply_transform_(t_rows, teacher_bias, spec.teacher)
        p = torch.sub(s_rows, student_lse[rows, None]).exp_()
        q = torch.sub(t_rows, teacher_lse[rows, None]).exp_()
        gap = _normalised_gap_(t_rows.sub_(s_rows), p, q, lse_gap[rows])
        sums[rows, 0] = spec.divergence.summand(p, q, gap).sum(1)
        sums[rows, 1] = spec.divergence.pull(p, q, gap).sum(1)
    return sums


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
    infinite = student_bias is not None or teacher_bias is not None
    for rows in _row_blocks(*s.shape):
        s_rows, t_rows = s[rows], t[rows]
        _apply_transform_(s_rows, student_bias, spec.student)
        _apply_transform_(t_rows, teacher_bias, spec.teacher)
        p = torch.sub(s_rows, student_lse[rows, None]).exp_()
        q = torch.sub(t_rows, teacher_lse[rows, None]).exp_()
        gap = t_rows.sub_(s_rows)
        weight = None if row_weight is None else row_weight[rows]
        _gradient_(s_rows, gap, p, q, lse_gap[rows], pull_sum[rows], weight, spec, infinite)
        if dz is not s:
            dz[rows] = s_rows


def stash_rows_(
    s: Tensor,
    t: Tensor,
    row_weight: Tensor | None,
    spec: RowSpec,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    dz: Tensor,
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `s`.

    Each softmax is computed once.
    """
    n, classes = s.shape
    infinite = student_bias is not None or teacher_bias is not None
    parts = torch.empty(n, 1, COLUMNS, dtype=s.dtype)
    values = torch.empty(n, dtype=s.dtype)
    mix = spec.divergence.kl_weights
    scratch: list[Tensor] = []
    for rows in _row_blocks(n, classes):
        s_rows, t_rows = s[rows], t[rows]
        if not scratch:
            scratch = [torch.empty_like(s_rows) for _ in range(3)]
        p, q, spare = (block[: s_rows.shape[0]] for block in scratch)
        _apply_transform_(s_rows, student_bias, spec.student)
        _apply_transform_(t_rows, teacher_bias, spec.teacher)
        torch.softmax(s_rows, 1, out=p)
        torch.softmax(t_rows, 1, out=q)
        gap = _block_statistics(s_rows, t_rows, p, q, spare, parts[rows, 0])
        stats = merge_parts(parts[rows])
        if mix is not None:
            values[rows], pull_sum = mixed_kl(stats, *mix)
        else:
            normalised = _normalised_gap_(gap.clone(), p, q, stats.lse_gap)
            values[rows] = spec.divergence.summand(p, q, normalised).sum(1)
            pull_sum = spec.divergence.pull(p, q, normalised).sum(1)
        weight = None if row_weight is None else row_weight[rows]
        _gradient_(s_rows, gap, p, q, stats.lse_gap, pull_sum, weight, spec, infinite)
        if dz is not s:
            dz[rows] = s_rows
    return values, merge_parts(parts)


def _normalised_gap_(gap: Tensor, p: Tensor, q: Tensor, lse_gap: Tensor) -> Tensor:
    """log q - log p from t - s, in place; 0 for a class that neither model can produce."""
    return gap.add_(lse_gap[:, None]).masked_fill_((p == 0) & (q == 0), 0.0)


def _gradient_(
    s: Tensor,
    gap: Tensor,
    p: Tensor,
    q: Tensor,
    lse_gap: Tensor,
    pull_sum: Tensor,
    row_weight: Tensor | None,
    spec: RowSpec,
    infinite: bool,
) -> None:
    """s <- w * (u - p * sum(u)), times what of d(transformed)/d(raw) is not constant.

    `gap` is t - s and `infinite` says that it may hold infinities.
    """
    softcap, chain = spec.student.softcap, None
    if softcap is not None:
        chain = s.mul(spec.student.temperature / softcap).square_().neg_().add_(1.0)
    mix = spec.divergence.kl_weights
    if mix is None:
        u = spec.divergence.pull(p, q, _normalised_gap_(gap, p, q, lse_gap))
        torch.addcmul(u, p, pull_sum[:, None], value=-1, out=s)
    elif mix[1] == 0:
        torch.sub(p, q, out=s)
        if mix[0] != 1:
            s.mul_(mix[0])
    else:
        forward, reverse = mix
        gap.sub_(((pull_sum + forward) / -reverse)[:, None])
        if infinite:
            # A class that the student cannot produce pulls nothing, whatever the gap there.
            gap.masked_fill_(p == 0, 0.0)
        torch.mul(gap, p, out=s)
        s.mul_(-reverse)
        if forward:
            s.add_(p, alpha=forward).sub_(q, alpha=forward)
    if chain is not None:
        s.mul_(chain)
    if row_weight is not None:
        s.mul_(row_weight[:, None])
