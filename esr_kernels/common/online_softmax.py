"""Merging the softmax statistics of parts of a row.

A *part* is a range of classes: a vocabulary tile, a split of a row over GPU programs, or another
rank's shard. It reports its maximum, the log of its sum of exp(z - maximum), and means weighted by
its own softmax. Parts merge by weighing the means with the part's share of the row: sums in a fixed
order, no atomics. Maximum and log-sum stay apart because the divergence of two models that nearly
agree is the difference of their log-sum-exps, which adding the maximum would round away.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Shares(NamedTuple):
    """Of rows in parts; X are trailing dimensions, such as (student, teacher)."""

    below_top: Tensor  # [T, parts, X] maximum of the part - maximum of the row
    weight: Tensor  # [T, parts, X] exp(below_top + log_sum): not divided by the total yet
    total: Tensor  # [T, X] sum of the weights


def shares(maxima: Tensor, log_sums: Tensor, top: Tensor) -> Shares:
    """The share of each part [T, parts, X] in rows whose maximum is `top` [T, X].

    A part with no class alive has maximum and log-sum -inf, and weight 0.
    """
    below_top = maxima - top[:, None]
    weight = (below_top + log_sums).exp()
    return Shares(below_top, weight, weight.sum(dim=1))


def weighted_mean(share: Tensor, means: Tensor) -> Tensor:
    """[T, X]: means [T, parts, X] weighted by shares that sum to 1; 0 times anything is 0."""
    return torch.where(share == 0, 0.0, share * means).sum(dim=1)
