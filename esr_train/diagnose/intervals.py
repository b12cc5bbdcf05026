"""Means over problems with bootstrap intervals, and what they are means of.

A problem is the unit that is drawn: its samples and its tokens are averaged first, so every problem
counts the same and the answers to one problem are not taken for independent. Two conditions are
compared by the differences within problems. An interval is of the problems that might have been
drawn; it says nothing of another training seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

LEVEL = 0.95
FEWEST = 5  # problems that an interval takes; of fewer there is a mean alone
_DRAWS = 2000
_SEED = 0

Interval = dict[str, Any]  # mean, low, high (None where unknown), problems


def interval(values: np.ndarray) -> Interval:
    """The mean of [problems], NaN where a problem has no value, and its percentile interval."""
    known = values[~np.isnan(values)]
    if not len(known):
        return {"mean": None, "low": None, "high": None, "problems": 0}
    low, high = _ends(known[:, None], lambda means: means[:, 0])
    return {"mean": float(known.mean()), "low": low, "high": high, "problems": len(known)}


def share(values: np.ndarray) -> Interval:
    """`interval` of values from 0 to 1.

    Where all are 0, or all 1, every draw is the same. Then the other end is that of the exact
    binomial interval: 1 - 0.025 ** (1 / problems) from the mean.
    """
    found = interval(values)
    if found["low"] is not None and found["low"] == found["high"] and found["mean"] in (0.0, 1.0):
        reach = 1 - ((1 - LEVEL) / 2) ** (1 / found["problems"])
        found["low" if found["mean"] == 1.0 else "high"] = abs(found["mean"] - reach)
    return found


def paired(after: np.ndarray, before: np.ndarray) -> Interval:
    """Of after - before, over the problems that have both."""
    return interval(after - before)


def relative(after: np.ndarray, before: np.ndarray) -> Interval:
    """Of mean(after) / mean(before) - 1, over the problems that have both, drawn as pairs."""
    both = np.stack([after, before], axis=1)
    both = both[~np.isnan(both).any(1)]
    empty = {"mean": None, "low": None, "high": None, "problems": len(both)}
    if not len(both) or not both[:, 1].mean():
        return empty
    low, high = _ends(both, lambda means: means[:, 0] / means[:, 1] - 1)
    mean = float(both[:, 0].mean() / both[:, 1].mean() - 1)
    return {**empty, "mean": mean, "low": low, "high": high}


def _ends(rows: np.ndarray, statistic: Any) -> tuple[float | None, float | None]:
    """Percentiles of a statistic of the means of [problems, columns], problems drawn again."""
    count = len(rows)
    if count < FEWEST:
        return None, None
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(rows[_draws(count)].mean(1))
    found = found[np.isfinite(found)]
    if not len(found):
        return None, None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(found, [tail, 100 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(count: int) -> np.ndarray:
    """Problems [draws, count], with replacement."""
    return np.random.default_rng(_SEED).integers(count, size=(_DRAWS, count))


def by_problem(values: np.ndarray, samples: int) -> np.ndarray:
    """[problems] of [problems * samples]: means of the samples that have a value."""
    return _mean(values.reshape(-1, samples), axis=1)


def by_position(values: np.ndarray, edges: Sequence[int], samples: int) -> np.ndarray:
    """[problems, bins] of [problems * samples, tokens]: means of the tokens of each bin.

    Bin i has the positions from edges[i] up to, not including, edges[i + 1].
    """
    grouped = values.reshape(len(values) // samples, samples, -1)
    bins = [
        _mean(grouped[:, :, start:stop].reshape(len(grouped), -1), axis=1)
        for start, stop in zip(edges, edges[1:], strict=False)
    ]
    return np.stack(bins, axis=1)


def position_edges(longest: int, also: Sequence[int] = ()) -> list[int]:
    """0, 1, 2, 4, 8, ... and `also`, up to `longest`: fine where an answer begins."""
    powers = [0] + [2**i for i in range(longest.bit_length()) if 2**i < longest]
    return sorted({*powers, *(edge for edge in also if 0 < edge < longest), longest})


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN for nothing."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(axis)
    count = known.sum(axis)
    found: np.ndarray = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return found
