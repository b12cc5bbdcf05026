"""The filters top-k, top-p and min-p in PyTorch.

Each filter keeps the first classes of a row in the order (largest logit first, then lowest id), so
together they keep as many as the strictest of them: the classes above a threshold, and at the
threshold those of the lowest ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.common.workspace import borrow
from esr_kernels.sampling.params import RowParams

# Largest logits of a row that are ranked for a top-p without top-k; all are if these are too few.
_WIDTH = 4096


def cut_(z: Tensor, top: Tensor, lse_above: Tensor, params: RowParams) -> Tensor:
    """The threshold [b] of the filters; ties at the threshold that they remove become -inf.

    `top` [b, 1] is the largest logit of each row, `lse_above` [b] its log-sum-exp - `top`.
    """
    threshold, at_threshold = _threshold(z, top, lse_above, params)
    has_late_ties = at_threshold < z.shape[1]
    if z.device.type == "cpu":  # reading values costs nothing, and few rows have such ties
        rows = has_late_ties.nonzero()[:, 0]
        if len(rows):
            some = z[rows]
            z[rows] = _without_late_ties(some, threshold[rows, None], at_threshold[rows, None])
    else:
        z.copy_(_without_late_ties(z, threshold[:, None], at_threshold[:, None]))
    return threshold


def _without_late_ties(z: Tensor, threshold: Tensor, keep: Tensor) -> Tensor:
    """-inf over all but the first `keep` classes of a row that are at its threshold."""
    ties = z == threshold
    return torch.where(ties & (ties.cumsum(1, dtype=torch.int32) > keep), -torch.inf, z)


def _threshold(
    z: Tensor, top: Tensor, lse_above: Tensor, params: RowParams
) -> tuple[Tensor, Tensor]:
    """(threshold [b], how many classes at it are kept [b]; the row's width means all of them)."""
    everything = z.shape[1]
    threshold = torch.full_like(top[:, 0], -torch.inf)
    at_threshold = torch.full_like(threshold, everything, dtype=torch.int64)
    if params.ranked:
        threshold, at_threshold = _ranked_threshold(z, top, lse_above, params)
    lowest = params.lowest(top[:, 0], (top[:, 0] + lse_above).to(top.dtype))
    if lowest is not None:
        higher = lowest > threshold
        threshold = torch.where(higher, lowest, threshold)
        at_threshold = torch.where(higher, everything, at_threshold)
    return threshold, at_threshold


def _ranked_threshold(
    z: Tensor, top: Tensor, lse_above: Tensor, params: RowParams
) -> tuple[Tensor, Tensor]:
    """`_threshold` of top-k and top-p.

    Ranks only the largest logits of a row, as many as top-k keeps or else `_WIDTH`. A row whose
    nucleus is larger than that is ranked again, whole.
    """
    everything = z.shape[1]
    k = torch.full_like(lse_above, everything, dtype=torch.int64)
    if params.top_k is not None:
        k = torch.where(params.top_k > 0, params.top_k.clamp(max=everything), everything)
    p = torch.ones_like(lse_above) if params.top_p is None else params.top_p.double()
    if z.device.type != "cpu":  # what follows reads values, which would wait for a GPU
        threshold, at_threshold, _ = _among_largest(z, top, lse_above, k, p, everything)
        return threshold, at_threshold
    threshold = torch.full_like(top[:, 0], -torch.inf)
    at_threshold = torch.full_like(k, everything)
    rows = ((k < everything) | (p < 1)).nonzero()[:, 0]
    for guess in (_WIDTH, everything):
        if len(rows) == 0:
            break
        ks = k[rows]
        most = int(torch.where(ks < everything, ks, 0).max())
        width = min(max(guess, most) if bool((ks == everything).any()) else most, everything)
        # Indexing copies; in the first round usually all rows are taken.
        whole = len(rows) == len(z)
        found, count, complete = _among_largest(
            z if whole else z[rows], top[rows], lse_above[rows], ks, p[rows], width
        )
        threshold[rows], at_threshold[rows] = found, count
        rows = rows[~complete]
    return threshold, at_threshold


def _largest(z: Tensor, count: int) -> Tensor:
    """The `count` largest logits of each row, descending."""
    if z.device.type != "cpu":
        return z.topk(count, dim=1).values
    # NumPy sorts and partitions with vector instructions, 5 to 20 times as fast as PyTorch.
    copy = borrow("ranked logits", tuple(z.shape), z.device, z.dtype).copy_(z)
    values = copy.numpy()
    if count < z.shape[1]:
        values.partition(-count, axis=1)
    values[:, -count:].sort(axis=1)
    return copy[:, -count:].flip(1)


def _among_largest(
    z: Tensor, top: Tensor, lse_above: Tensor, k: Tensor, p: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(threshold, kept at it, whether the `width` largest logits determine both), each [b]."""
    everything = z.shape[1]
    # One more than needed, to find out whether it is equal to the last.
    values = _largest(z, min(width + 1, everything))
    mass = (values[:, :width] - top).double().exp().cumsum(1)
    among_k = mass.gather(1, k.clamp(max=width)[:, None] - 1)[:, 0]
    total = torch.where(k <= width, among_k, lse_above.exp())
    nucleus = (mass < (p * total)[:, None]).sum(1) + 1
    count = torch.where(p < 1, torch.minimum(nucleus, k), k)
    complete = (count <= width) | (width == everything)
    last = values.gather(1, count.clamp(max=width)[:, None] - 1)
    tied = values.gather(1, count.clamp(max=values.shape[1] - 1)[:, None]) == last
    tied &= (count < everything)[:, None]
    above = (values > last).sum(1)
    at_threshold = torch.where(tied[:, 0], count - above, everything)
    return last[:, 0], at_threshold, complete
