"""Reduction of the values of rows to a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_rows(values: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """weights * values [T], their sum, or their mean over the sum of the weights.

    `weights` [T] is None for all 1. A row of weight 0 contributes 0, even if its value is NaN. The
    mean over weights that sum to 0 divides by 1.
    """
    if weights is not None:
        values = torch.where(weights != 0, weights * values, 0.0)
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if weights is None:
        return values.sum() / max(values.shape[0], 1)
    total = weights.sum()
    return values.sum() / torch.where(total == 0, 1.0, total)
