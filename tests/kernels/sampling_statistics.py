"""What the statistical tests of the sampler count, and when they cry."""

from __future__ import annotations

import torch
from torch import Tensor

# A correct sampler fails one test in ten million, and the suite makes about 40. Seeds are fixed, so
# what passes once passes always.
FALSE_ALARM = 1e-7
_SMALLEST_EXPECTED = 10.0


def chi_square_p_value(counts: Tensor, p: Tensor) -> float:
    """Of `counts` [V] from `p` [V] fp64; bins that expect fewer than 10 are pooled.

    A count where `p` is 0 makes it 0.
    """
    assert counts.shape == p.shape
    if bool((counts[p == 0] > 0).any()):
        return 0.0
    expected = p * counts.sum()
    order = expected.argsort(descending=True)
    expected, observed = expected[order], counts[order].double()
    alone = int((expected >= _SMALLEST_EXPECTED).sum())
    if alone and expected[alone:].sum() < _SMALLEST_EXPECTED:
        alone -= 1  # the others are too few for a bin of their own
    expected = torch.cat([expected[:alone], expected[alone:].sum()[None]])
    observed = torch.cat([observed[:alone], observed[alone:].sum()[None]])
    if len(expected) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic.cpu() / 2))


def assert_distribution(tokens: Tensor, p: Tensor) -> None:
    """`tokens` [N] are draws from `p` [V]."""
    counts = torch.bincount(tokens, minlength=len(p))
    assert len(counts) == len(p), "a token beyond the vocabulary"
    assert chi_square_p_value(counts, p.double()) > FALSE_ALARM


def assert_independent(first: Tensor, second: Tensor, p: Tensor) -> None:
    """Pairs of draws [N] from `p` [V] have the product distribution on [V, V]."""
    assert_distribution(first * len(p) + second, torch.outer(p, p).flatten())


def poisson_range(mean: float) -> tuple[int, int]:
    """Counts that a Poisson variate leaves, to either side, with probability below FALSE_ALARM."""
    counts = torch.arange(1, 10 * int(mean) + 100, dtype=torch.float64)
    up_to = torch.special.gammaincc(counts, torch.full_like(counts, mean))  # P(less than count)
    low = int((up_to < FALSE_ALARM).sum())
    return low, int((1 - up_to >= FALSE_ALARM).sum()) + 1
