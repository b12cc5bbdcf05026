"""The statistics of a report: crossings of a threshold, bootstrap intervals, values at equal cost.

Seeds are few. An interval here is the percentile bootstrap over seeds, paired: a seed is drawn with
the runs of both arms, which saw the same prompts in the same order. Of n seeds there are
(2n - 1)! / (n! (n - 1)!) different draws, 3 for two seeds and 126 for five, so such an interval is
rough, and its real coverage is below 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from esr_train.report.results import Run, Seed, known, number

COSTS = {"seconds": "train_seconds", "tokens": "tokens", "steps": "step"}
RESAMPLES = 10_000
LEVEL = 0.95
_NO_SPREAD = (math.nan, math.nan)


@dataclass(frozen=True)
class Crossing:
    """The cost at which a run reaches the threshold, each by `COSTS`; infinite where it does not.

    `cost` is interpolated linearly in the metric between `after`, the last evaluation before it,
    and `by`, the first at or past it.
    """

    cost: dict[str, float]
    after: dict[str, float]
    by: dict[str, float]


def crossing(run: Run, seed: Seed) -> Crossing | None:
    """Where a run first reaches the threshold; None if the metric was never measured."""
    before = None
    for row in seed.evals:
        value = number(row, "metrics", run.report.metric)
        if math.isnan(value):
            continue
        costs = {cost: number(row, key) for cost, key in COSTS.items()}
        if run.passes(value):
            if before is None:
                return Crossing(costs, costs, costs)
            was, after = before
            # From below the threshold to it or past it; a rounding below it counts as it.
            share = min(1.0, (run.report.threshold - was) / (value - was))
            cost = {name: after[name] + share * (costs[name] - after[name]) for name in COSTS}
            return Crossing(cost, after, costs)
        before = value, costs
    if before is None:
        return None
    never = dict.fromkeys(COSTS, math.inf)
    return Crossing(never, before[1], never)


def value_at(run: Run, seed: Seed, cost: str, at: float) -> float:
    """The metric of a run at a cost, interpolated between evaluations; its last value after."""
    rows = [(number(r, COSTS[cost]), number(r, "metrics", run.report.metric)) for r in seed.evals]
    points = sorted(point for point in rows if len(known(point)) == 2)
    if not points:
        return math.nan
    xs, ys = zip(*points, strict=True)
    return float(np.interp(at, xs, ys))


def bootstrap(
    pairs: list[tuple[float, float]], statistic: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Limits of the percentile interval of `statistic` over resampled pairs; NaN below two pairs.

    `statistic` maps [..., pairs, 2] to [...]. It may be infinite; where it is undefined, a resample
    is left out.
    """
    if len(pairs) < 2:
        return _NO_SPREAD
    drawn = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(np.array(pairs, dtype=float)[drawn])
    values = values[~np.isnan(values)]
    if not len(values):
        return _NO_SPREAD
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def ratio_of_medians(pairs: np.ndarray) -> np.ndarray:
    """Median of the second of each pair over that of the first; of infinities, undefined."""
    middle = np.median(pairs, axis=-2)
    quotient: np.ndarray = middle[..., 1] / middle[..., 0]
    return quotient


def mean_difference(pairs: np.ndarray) -> np.ndarray:
    """Mean of the first of each pair less the second."""
    difference: np.ndarray = (pairs[..., 0] - pairs[..., 1]).mean(-1)
    return difference
