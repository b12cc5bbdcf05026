"""Row passes in PyTorch: for fp64, for divergences without a kernel, and on CPU without a compiler.

Every function takes a tile of fp32 (or fp64) raw logits and may overwrite it. Rows are processed in
blocks that stay in the cache: the passes read or write a block about ten times, main memory three
times. They call softmax() instead of exp(): its vectorised exponential is faster, and the
log-sum-exp follows as max - log(max probability).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from esr_kernels.common.tiles import row_blocks
from esr_kernels.common.transform import transform_
from esr_kernels.common.workspace import borrow
from esr_kernels.divergence.statistics import (
    ARGMAX,
    CENTRED,
    COLUMNS,
    DIFFERENCE,
    LOG_SUM,
    MAX,
    RowNormalizers,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    merge_parts,
    mixed_kl,
    mixed_kl_pull_sum,
    part_lse_difference,
    with_labels,
)
from esr_kernels.divergence.statistics import merge_rows as merge_rows

_ARGMAX_WIDTH = 512
# Statistics and pull sums leave the transformed logits where the raw ones were.
TRANSFORMS_IN_PLACE = True


def _scratch(like: Tensor, count: int) -> list[Tensor]:
    """Buffers for a block of `like`."""
    height = next(row_blocks(*like.shape), slice(0)).stop
    shape = height, like.shape[1]
    return [borrow(f"block {i}", shape, like.device, like.dtype) for i in range(count)]


@functools.cache
def _strip(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(_ARGMAX_WIDTH, device=device), torch.full((), _ARGMAX_WIDTH, device=device)


def _argmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(max, first argmax) of each row, by strips: torch's max with indices is not vectorised."""
    classes = z.shape[1]
    whole = classes // _ARGMAX_WIDTH * _ARGMAX_WIDTH
    tops = z[:, :whole].unflatten(1, (-1, _ARGMAX_WIDTH)).amax(-1)
    if whole < classes:
        tops = torch.cat([tops, z[:, whole:].amax(-1, keepdim=True)], dim=1)
    top, strip = tops.max(dim=1, keepdim=True)
    # Past the end the last class repeats, which is harmless: of equal logits the first is taken.
    inside, width = _strip(z.device)
    columns = torch.addcmul(inside, strip, width).clamp_(max=classes - 1)
    offset = z.gather(1, columns).argmax(1, keepdim=True)
    return top, columns.gather(1, offset)


def _block_statistics(
    s: Tensor,
    t: Tensor,
    p: Tensor,
    q: Tensor,
    difference: Tensor,
    parts: Tensor,
    needs: tuple[bool, bool] = (True, True),
) -> None:
    """Fill `parts` [n, COLUMNS] from a block of transformed logits and their softmaxes.

    Leaves t - s in `difference`, which stays in the cache; a write to t would go to main memory.
    `needs`: whether the mean differences under p and under q are needed; if not, they are 0.
    """
    for column, z, probability in ((0, s, p), (1, t, q)):
        top, argmax = _argmax(z)
        centred = torch.sub(z, top, out=difference)
        parts[:, column + MAX.start] = top[:, 0]
        parts[:, column + LOG_SUM.start] = probability.gather(1, argmax)[:, 0].log_().neg_()
        parts[:, column + CENTRED.start] = _weighted_sum(probability, centred)
        parts[:, column + ARGMAX.start] = argmax[:, 0]
    torch.sub(t, s, out=difference)
    parts[:, DIFFERENCE.start] = _weighted_sum(p, difference) if needs[0] else 0.0
    parts[:, DIFFERENCE.start + 1] = _weighted_sum(q, difference) if needs[1] else 0.0


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    total = torch.linalg.vecdot(weights, values)
    # 0 * inf: a class of probability 0 adds 0, even if its logit is infinite. On CPU, where reading
    # a value does not synchronise, this is done only if needed.
    if total.device.type != "cpu" or not bool(total.isfinite().all()):
        total = torch.where(weights > 0, weights * values, 0.0).sum(1)
    return total


def _transform_(tile: Tile, spec: RowSpec) -> None:
    transform_(tile.s, tile.student_bias, spec.student)
    transform_(tile.t, tile.teacher_bias, spec.teacher)


def tile_stats(tile: Tile, spec: RowSpec) -> Tensor:
    """Statistics [n, 1, COLUMNS] of a tile of classes; overwrites the logits."""
    parts = tile.s.new_empty(tile.s.shape[0], 1, COLUMNS)
    scratch = _scratch(tile.s, 3)
    for rows in row_blocks(*tile.s.shape):
        block = tile.rows(rows)
        p, q, spare = (buffer[: block.s.shape[0]] for buffer in scratch)
        _transform_(block, spec)
        torch.softmax(block.s, 1, out=p)
        torch.softmax(block.t, 1, out=q)
        _block_statistics(block.s, block.t, p, q, spare, parts[rows, 0])
    if tile.may_be_infinite:
        # A softmax over only -inf is NaN; such a part has no mass.
        for column in range(2):
            dead = parts[:, 0, MAX][:, column] == -torch.inf
            for field, value in ((LOG_SUM, -torch.inf), (DIFFERENCE, 0.0), (CENTRED, 0.0)):
                parts[:, 0, field][dead, column] = value
    return parts


def tile_pull_sums(tile: Tile, stats: RowStats, spec: RowSpec) -> Tensor:
    """Sums [n, 3] over a tile of summands, pulls and p, for divergences that take two passes."""
    sums = tile.s.new_empty(tile.s.shape[0], 3)
    scratch = _scratch(tile.s, 3)
    for rows in row_blocks(*tile.s.shape):
        block = tile.rows(rows)
        p, q, difference = (buffer[: block.s.shape[0]] for buffer in scratch)
        _probabilities_(block, stats, rows, spec, p, q)
        torch.sub(block.t, block.s, out=difference)
        log_ratio = _log_ratio_(difference, p, q, stats.lse_difference[rows])
        sums[rows] = _pull_sums(p, q, log_ratio, spec)
    return sums


def _pull_sums(p: Tensor, q: Tensor, log_ratio: Tensor, spec: RowSpec) -> Tensor:
    divergence = spec.divergence
    terms = divergence.summand(p, q, log_ratio), divergence.pull(p, q, log_ratio), p
    return torch.stack([term.sum(1) for term in terms], dim=1)


def tile_gradient_(
    tile: Tile, normalizers: RowNormalizers, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> None:
    """Write dz [n, V] of a tile, given its rows' normalizers; `dz` may be `tile.s`."""
    scratch = _scratch(tile.s, 2)
    for rows in row_blocks(*tile.s.shape):
        block, row = tile.rows(rows), normalizers.rows(rows)
        p, q = (buffer[: block.s.shape[0]] for buffer in scratch)
        _probabilities_(block, normalizers, rows, spec, p, q)
        difference = block.t.sub_(block.s)
        weight = None if row_weight is None else row_weight[rows]
        _gradient_(block, difference, p, q, row.lse_difference, row.pull_sum, weight, spec)
        if dz is not tile.s:
            dz[rows] = block.s


def stash_rows_(
    tile: Tile, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `tile.s`.

    Each softmax is computed once.
    """
    n = tile.s.shape[0]
    parts = tile.s.new_empty(n, 1, COLUMNS)
    mix = spec.divergence.kl_weights
    sums = tile.s.new_empty(n if mix is None else 0, 3)
    needs = (mix is not None and mix[1] > 0, mix is not None and mix[0] > 0)
    scratch = _scratch(tile.s, 3)
    for rows in row_blocks(*tile.s.shape):
        block, part = tile.rows(rows), parts[rows, 0]
        p, q, difference = (buffer[: block.s.shape[0]] for buffer in scratch)
        _transform_(block, spec)
        torch.softmax(block.s, 1, out=p)
        torch.softmax(block.t, 1, out=q)
        _block_statistics(block.s, block.t, p, q, difference, part, needs)
        if mix is not None:
            lse_difference, pull_sum = None, mixed_kl_pull_sum(part[:, DIFFERENCE.start], *mix)
        else:
            lse_difference = part_lse_difference(part)
            log_ratio = _log_ratio_(block.t.copy_(difference), p, q, lse_difference)
            sums[rows] = _pull_sums(p, q, log_ratio, spec)
            _, pull_sum = from_pull_sums(sums[rows])
        pull_sum = with_labels(pull_sum, block.labels, spec)
        weight = None if row_weight is None else row_weight[rows]
        _gradient_(block, difference, p, q, lse_difference, pull_sum, weight, spec)
        if dz is not tile.s:
            dz[rows] = block.s
    stats = merge_parts(parts)
    value, _ = from_pull_sums(sums) if mix is None else mixed_kl(stats, *mix)
    return value, stats


def _probabilities_(
    block: Tile,
    known: RowStats | RowNormalizers,
    rows: slice,
    spec: RowSpec,
    p: Tensor,
    q: Tensor,
) -> None:
    """Transform a block of `rows` whose log-sum-exps are `known`, and fill p and q."""
    _transform_(block, spec)
    for z, lse, residual, probability in (
        (block.s, known.student_lse, known.student_residual, p),
        (block.t, known.teacher_lse, known.teacher_residual, q),
    ):
        torch.sub(z, lse[rows, None], out=probability).exp_()
        probability.mul_(residual[rows, None].neg().exp_())


def _log_ratio_(difference: Tensor, p: Tensor, q: Tensor, lse_difference: Tensor) -> Tensor:
    """log q - log p from t - s, in place; 0 for a class of probability 0 under both models."""
    return difference.add_(lse_difference[:, None]).masked_fill_((p == 0) & (q == 0), 0.0)


def _gradient_(
    block: Tile,
    difference: Tensor,
    p: Tensor,
    q: Tensor,
    lse_difference: Tensor | None,
    pull_sum: Tensor,
    row_weight: Tensor | None,
    spec: RowSpec,
) -> None:
    """block.s <- w * (u - p * sum(u)) * (1 - tanh^2 of the softcap).

    `difference` is t - s; `lse_difference` may be None for mixes of the two KLs. `pull_sum` [n]
    includes the pull of the labels; the pull at the label itself is added here.
    """
    s, softcap, chain = block.s, spec.student.softcap, None
    if softcap is not None:
        chain = s.mul(spec.student.temperature / softcap).square_().neg_().add_(1.0)
        if block.may_be_infinite:
            chain.clamp_(min=0.0)  # a removed class's logit is -inf
    pull_sum = pull_sum[:, None]
    mix = spec.divergence.kl_weights
    if mix is None:
        assert lse_difference is not None
        u = spec.divergence.pull(p, q, _log_ratio_(difference, p, q, lse_difference))
        torch.addcmul(u, p, pull_sum, value=-1, out=s)
    else:
        forward, reverse = mix
        if reverse:
            # -(reverse * difference + sum of pulls) * p
            if reverse == 1:
                torch.sub(-pull_sum, difference, out=difference)
            else:
                difference.mul_(-reverse).sub_(pull_sum)
            if block.may_be_infinite:
                # The pull of a class of probability 0 is 0, even if its difference is infinite.
                difference.masked_fill_(p == 0, 0.0)
            torch.mul(difference, p, out=s)
            if forward:
                s.sub_(q, alpha=forward)
        elif block.labels is None and forward == 1:
            torch.sub(p, q, out=s)
        else:
            torch.addcmul(q.mul_(-forward), p, pull_sum, value=-1, out=s)
    if block.labels is not None:
        # Rows without a label add 0 to class 0: selecting the others would synchronise a GPU.
        labelled = (block.labels >= 0) & (block.labels < s.shape[1])
        column = torch.where(labelled, block.labels, 0)[:, None]
        # In the dtype of s throughout: fp64 keeps all digits of the weight.
        taken = labelled.to(s.dtype).mul_(-spec.label_weight)
        s.scatter_add_(1, column, taken[:, None])
    if chain is not None:
        s.mul_(chain)
    if row_weight is not None:
        s.mul_(row_weight[:, None])
