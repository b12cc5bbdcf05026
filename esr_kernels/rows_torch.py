"""Row passes in PyTorch: the CPU path.

Every function takes a tile of fp32 (or fp64) raw logits and may overwrite them. Rows go through in
blocks that stay in the cache: the passes below touch a block about ten times, main memory three
times. softmax() is used where exp() would do, since its vectorised exponential is faster and it
takes the maximum along; the log-sum-exp falls out as max - log(max probability).
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
    RowsKnown,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    known_rows,
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


def _transform_(tile: Tile, spec: RowSpec) -> None:
    _apply_transform_(tile.s, tile.student_bias, spec.student)
    _apply_transform_(tile.t, tile.teacher_bias, spec.teacher)


def tile_stats(tile: Tile, spec: RowSpec) -> Tensor:
    """Statistics [n, 1, COLUMNS] of a tile of classes; overwrites the logits."""
    parts = torch.empty(tile.s.shape[0], 1, COLUMNS, dtype=tile.s.dtype)
    for rows in _row_blocks(*tile.s.shape):
        block = tile.rows(rows)
        _transform_(block, spec)
        p, q = block.s.softmax(1), block.t.softmax(1)
        _block_statistics(block.s, block.t, p, q, torch.empty_like(p), parts[rows, 0])
    if tile.may_be_infinite:
        # A softmax over nothing but -inf is NaN; such a part has no mass and weighs nothing.
        for column in range(2):
            dead = parts[:, 0, MAX][:, column] == -torch.inf
            for field, value in ((LOG_SUM, -torch.inf), (GAP, 0.0), (CENTRED, 0.0)):
                parts[:, 0, field][dead, column] = value
    return parts


def tile_pull_sums(tile: Tile, stats: RowStats, spec: RowSpec) -> Tensor:
    """Sums [n, 3] over a tile of summands, pulls and p, for divergences that take two passes."""
    sums = torch.empty(tile.s.shape[0], 3, dtype=tile.s.dtype)
    for rows in _row_blocks(*tile.s.shape):
        block = tile.rows(rows)
        p, q, gap = _probabilities(block, stats.student_lse[rows], stats.teacher_lse[rows], spec)
        gap = _normalised_gap_(gap, p, q, stats.lse_gap[rows])
        sums[rows] = _pull_sums(p, q, gap, spec)
    return sums


def _pull_sums(p: Tensor, q: Tensor, gap: Tensor, spec: RowSpec) -> Tensor:
    divergence = spec.divergence
    terms = divergence.summand(p, q, gap), divergence.pull(p, q, gap), p
    return torch.stack([term.sum(1) for term in terms], dim=1)


def tile_gradient_(
    tile: Tile, known: RowsKnown, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> None:
    """Write dz [n, V] of a tile whose rows are known; `dz` may be `tile.s`."""
    for rows in _row_blocks(*tile.s.shape):
        block, row = tile.rows(rows), known.rows(rows)
        p, q, gap = _probabilities(block, row.student_lse, row.teacher_lse, spec)
        weight = None if row_weight is None else row_weight[rows]
        _gradient_(block, gap, p, q, row, weight, spec)
        if dz is not tile.s:
            dz[rows] = block.s


def stash_rows_(
    tile: Tile, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `tile.s`.

    Each softmax is computed once.
    """
    n, classes = tile.s.shape
    parts = torch.empty(n, 1, COLUMNS, dtype=tile.s.dtype)
    values = torch.empty(n, dtype=tile.s.dtype)
    mix = spec.divergence.kl_weights
    scratch: list[Tensor] = []
    for rows in _row_blocks(n, classes):
        block = tile.rows(rows)
        if not scratch:
            scratch = [torch.empty_like(block.s) for _ in range(3)]
        p, q, spare = (buffer[: block.s.shape[0]] for buffer in scratch)
        _transform_(block, spec)
        torch.softmax(block.s, 1, out=p)
        torch.softmax(block.t, 1, out=q)
        gap = _block_statistics(block.s, block.t, p, q, spare, parts[rows, 0])
        stats = merge_parts(parts[rows])
        if mix is not None:
            values[rows], pull_sum = mixed_kl(stats, *mix)
        else:
            normalised = _normalised_gap_(spare.copy_(gap), p, q, stats.lse_gap)
            values[rows], pull_sum = from_pull_sums(_pull_sums(p, q, normalised, spec))
        weight = None if row_weight is None else row_weight[rows]
        _gradient_(block, gap, p, q, known_rows(stats, pull_sum, block.labels, spec), weight, spec)
        if dz is not tile.s:
            dz[rows] = block.s
    return values, merge_parts(parts)


def _probabilities(
    block: Tile, student_lse: Tensor, teacher_lse: Tensor, spec: RowSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, t - s) of a block whose rows' log-sum-exps are known; the gap lies over t."""
    _transform_(block, spec)
    p = torch.sub(block.s, student_lse[:, None]).exp_()
    q = torch.sub(block.t, teacher_lse[:, None]).exp_()
    return p, q, block.t.sub_(block.s)


def _normalised_gap_(gap: Tensor, p: Tensor, q: Tensor, lse_gap: Tensor) -> Tensor:
    """log q - log p from t - s, in place; 0 for a class that neither model can produce."""
    return gap.add_(lse_gap[:, None]).masked_fill_((p == 0) & (q == 0), 0.0)


def _gradient_(
    block: Tile,
    gap: Tensor,
    p: Tensor,
    q: Tensor,
    known: RowsKnown,
    row_weight: Tensor | None,
    spec: RowSpec,
) -> None:
    """block.s <- w * (u - p * sum(u)), times what of d(transformed)/d(raw) is not constant.

    `gap` is t - s. The pull of the labels is in `known.pull_sum` and added at the labels here.
    """
    s, softcap, chain = block.s, spec.student.softcap, None
    if softcap is not None:
        chain = s.mul(spec.student.temperature / softcap).square_().neg_().add_(1.0)
    pull_sum = known.pull_sum[:, None]
    mix = spec.divergence.kl_weights
    if mix is None:
        u = spec.divergence.pull(p, q, _normalised_gap_(gap, p, q, known.lse_gap))
        torch.addcmul(u, p, pull_sum, value=-1, out=s)
    else:
        forward, reverse = mix
        if reverse:
            # -(reverse * gap + sum of pulls) * p
            if reverse == 1:
                torch.sub(-pull_sum, gap, out=gap)
            else:
                gap.mul_(-reverse).sub_(pull_sum)
            if block.may_be_infinite:
                # A class that the student cannot produce pulls nothing, whatever the gap there.
                gap.masked_fill_(p == 0, 0.0)
            torch.mul(gap, p, out=s)
            if forward:
                s.sub_(q, alpha=forward)
        elif block.labels is None and forward == 1:
            torch.sub(p, q, out=s)
        else:
            torch.addcmul(q.mul_(-forward), p, pull_sum, value=-1, out=s)
    if block.labels is not None:
        row = ((block.labels >= 0) & (block.labels < s.shape[1])).nonzero()[:, 0]
        s[row, block.labels[row]] -= spec.label_weight
    if chain is not None:
        s.mul_(chain)
    if row_weight is not None:
        s.mul_(row_weight[:, None])
