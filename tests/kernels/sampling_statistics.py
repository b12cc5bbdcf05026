"""What the statistical tests of the sampler count, and when they cry."""

from __future__ import annotations

import math

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
    small = expected < _SMALLEST_EXPECTED
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed = torch.cat([counts[~small], counts[small].sum()[None]]).double()
    if expected[-1] < _SMALLEST_EXPECTED and len(expected) > 1:
        # Too few for a bin of their own: into the smallest of the others.
        order = expected[:-1].argsort(descending=True)
        expected = torch.cat([expected[:-1][order], expected[-1:]])
        observed = torch.cat([observed[:-1][order], observed[-1:]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
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
    below, total = 0, math.exp(-mean)
    while total < FALSE_ALARM:
        below += 1
        total += math.exp(-mean + below * math.log(mean) - math.lgamma(below + 1))
    above = math.ceil(mean)
    # The tail beyond is less than its first term times mean-dependent geometric sum.
    while True:
        term = math.exp(-mean + above * math.log(mean) - math.lgamma(above + 1))
        if term / (1 - mean / (above + 1)) < FALSE_ALARM:
            return below, above
        above += 1
