"""The numbers of a report: means, medians, costs and ratios of each arm.

Unknown numbers are NaN; the cost of a threshold that was never reached is infinity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from esr_train.report.results import Arm, Run, known, number
from esr_train.report.statistics import (
    COSTS,
    Crossing,
    bootstrap,
    crossing,
    mean_difference,
    ratio_of_medians,
    value_at,
)

_UNKNOWN = (math.nan, math.nan)

PHASES = ("rollout", "teacher", "student")


@dataclass(frozen=True)
class Spread:
    """A middle (mean or median, as the field says) with low and high over `count` seeds: extremes,
    or where the field says so the limits of a bootstrap interval."""

    middle: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class AtEqualCost:
    """The metric of an arm and of the baseline where the cheaper of the two ends.

    cost: mean over seeds. own, base: mean over seeds with extremes. difference: mean of own - base
    with its interval.
    """

    cost: float
    own: Spread
    base: Spread
    difference: Spread


@dataclass(frozen=True)
class Stability:
    """How runs end.

    drop: from a run's best value to its final one, mean over seeds with extremes, at least 0.
    below_start: runs that end below their value before training. eos_rate: share of the sampled
    answers of the last evaluation that end by themselves; the others run to eval.max_new_tokens.
    rollout_eos_rate: the same of the rollouts of the last step.
    """

    drop: Spread
    below_start: int
    eos_rate: float
    rollout_eos_rate: float


@dataclass(frozen=True)
class ArmSummary:
    """The numbers of one arm. Ratios are baseline / arm: above 1 means that the arm needs less.

    start, final, best: mean over seeds of the metric, with extremes. to_threshold: median over
    evaluated seeds of the interpolated cost, where a seed that never gets there counts as infinity;
    bracket: medians of the evaluations before and at it. ratios: of medians over the seeds that
    both arms have, with a paired bootstrap interval. step_seconds: mean over steps, then seeds, per
    phase. peak_bytes: maximum over steps and seeds, per phase.
    """

    name: str
    max_new_tokens: int
    seeds: int
    evaluated: int
    reached: int
    start: Spread
    final: Spread
    best: Spread
    to_threshold: dict[str, float]
    bracket: dict[str, tuple[float, float]]
    ratios: dict[str, Spread]
    at_equal: dict[str, AtEqualCost]
    stability: Stability
    step_seconds: dict[str, float]
    seconds_per_step: float
    tokens_per_step: float
    speedup_per_step: float
    peak_bytes: dict[str, float]
    peak: float
    memory_ratio: float


def summarise(run: Run) -> list[ArmSummary]:
    """One summary per arm, in the order of run.arms."""
    empty = Arm("", run.config, [])  # without costs, so that every ratio to it is NaN
    baseline = next((arm for arm in run.arms if arm.name == run.baseline), empty)
    return [_summarise_arm(run, arm, baseline) for arm in run.arms]


def _summarise_arm(run: Run, arm: Arm, baseline: Arm) -> ArmSummary:
    values = [known(number(r, "metrics", run.report.metric) for r in s.evals) for s in arm.seeds]
    values = [series for series in values if series]
    better = max if run.report.higher_is_better else min
    starts = [series[0] for series in values]
    finals = [series[-1] for series in values]
    bests = [better(series) for series in values]

    own, base = _crossings(run, arm), _crossings(run, baseline)
    common = sorted(own.keys() & base.keys())
    to_threshold, bracket, ratios = {}, {}, {}
    for cost in COSTS:
        to_threshold[cost] = _median(item.cost[cost] for item in own.values())
        bracket[cost] = (
            _median(item.after[cost] for item in own.values()),
            _median(item.by[cost] for item in own.values()),
        )
        pairs = [(own[k].cost[cost], base[k].cost[cost]) for k in common]
        middle = _divide(_median(b for _, b in pairs), _median(a for a, _ in pairs))
        limits = bootstrap(pairs, ratio_of_medians) if math.isfinite(middle) else _UNKNOWN
        ratios[cost] = Spread(middle, *limits, len(pairs))

    seconds, peaks = _step_costs(arm)
    base_seconds, base_peaks = _step_costs(baseline)
    per_step = _total(seconds)
    peak = _highest(peaks)
    return ArmSummary(
        name=arm.name,
        max_new_tokens=arm.max_new_tokens,
        seeds=len(arm.seeds),
        evaluated=len(own),
        reached=sum(math.isfinite(item.cost["steps"]) for item in own.values()),
        start=_extremes(starts),
        final=_extremes(finals),
        best=_extremes(bests),
        to_threshold=to_threshold,
        bracket=bracket,
        ratios=ratios,
        at_equal={cost: _at_equal(run, arm, baseline, cost) for cost in ("seconds", "tokens")},
        stability=_stability(run, arm, starts, finals, bests),
        step_seconds=seconds,
        seconds_per_step=per_step,
        tokens_per_step=_mean(_mean(number(r, "tokens") for r in s.metrics) for s in arm.seeds),
        speedup_per_step=_divide(_total(base_seconds), per_step),
        peak_bytes=peaks,
        peak=peak,
        memory_ratio=_divide(_highest(base_peaks), peak),
    )


def _crossings(run: Run, arm: Arm) -> dict[int, Crossing]:
    found = {seed.number: crossing(run, seed) for seed in arm.seeds}
    return {k: item for k, item in found.items() if item is not None}


def _at_equal(run: Run, arm: Arm, baseline: Arm, cost: str) -> AtEqualCost:
    theirs = {seed.number: seed for seed in baseline.seeds if seed.evals}
    costs, pairs = [], []
    for seed in arm.seeds:
        other = theirs.get(seed.number)
        if not seed.evals or other is None:
            continue
        at = min(number(s.evals[-1], COSTS[cost]) for s in (seed, other))
        pair = tuple(value_at(run, s, cost, at) for s in (seed, other))
        if len(known([at, *pair])) == 3:
            costs.append(at)
            pairs.append((pair[0], pair[1]))
    difference = _mean(own - base for own, base in pairs)
    return AtEqualCost(
        _mean(costs),
        _extremes([own for own, _ in pairs]),
        _extremes([base for _, base in pairs]),
        Spread(difference, *bootstrap(pairs, mean_difference), len(pairs)),
    )


def _stability(
    run: Run, arm: Arm, starts: list[float], finals: list[float], bests: list[float]
) -> Stability:
    sign = 1 if run.report.higher_is_better else -1
    drops = [sign * (best - final) for best, final in zip(bests, finals, strict=True)]
    below = sum(sign * (end - start) < 0 for start, end in zip(starts, finals, strict=True))
    return Stability(
        _extremes(drops),
        below,
        _mean(number(s.evals[-1], "metrics", "eos_rate") for s in arm.seeds if s.evals),
        _mean(number(s.metrics[-1], "eos_rate") for s in arm.seeds if s.metrics),
    )


def _step_costs(arm: Arm) -> tuple[dict[str, float], dict[str, float]]:
    """Mean seconds a step and peak bytes, each by phase."""
    seconds = {
        phase: _mean(
            _mean(number(row, "seconds", phase) for row in seed.metrics) for seed in arm.seeds
        )
        for phase in PHASES
    }
    peaks = {
        phase: max(
            known(number(row, "peak_bytes", phase) for seed in arm.seeds for row in seed.metrics),
            default=math.nan,
        )
        for phase in PHASES
    }
    return seconds, peaks


def _extremes(values: list[float]) -> Spread:
    if not values:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread(_mean(values), min(values), max(values), len(values))


def _total(by_phase: dict[str, float]) -> float:
    kept = known(by_phase.values())
    return sum(kept) if kept else math.nan


def _highest(by_phase: dict[str, float]) -> float:
    return max(known(by_phase.values()), default=math.nan)


def _median(values: Iterable[float]) -> float:
    kept = known(values)
    return statistics.median(kept) if kept else math.nan


def _mean(values: Iterable[float]) -> float:
    """Mean of the known values; NaN where there is none."""
    kept = known(values)
    return statistics.fmean(kept) if kept else math.nan


def _divide(numerator: float, denominator: float) -> float:
    """numerator / denominator where both are positive and finite, else NaN."""
    usable = all(math.isfinite(value) and value > 0 for value in (numerator, denominator))
    return numerator / denominator if usable else math.nan
