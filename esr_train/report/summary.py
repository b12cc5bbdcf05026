"""The numbers of a report: means, medians, costs and ratios of each arm.

Unknown numbers are NaN; the cost of a threshold that was never reached is infinity.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from esr_train.report.results import Arm, Run, Seed, known, number

PHASES = ("rollout", "teacher", "student")
COSTS = ("seconds", "tokens", "steps")


@dataclass(frozen=True)
class Spread:
    """A middle (mean or median, as the field says) with the extremes over `count` seeds."""

    middle: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class ArmSummary:
    """The numbers of one arm. Ratios are baseline / arm: above 1 means that the arm needs less.

    final, best: mean over seeds of the metric. to_threshold: median over evaluated seeds, where a
    seed that never gets there counts as infinity. ratios: of those medians, low and high over
    the seeds where both arms got there. step_seconds: mean over steps, then seeds, per phase.
    peak_bytes: maximum over steps and seeds, per phase.
    """

    name: str
    max_new_tokens: int
    seeds: int
    evaluated: int
    reached: int
    final: Spread
    best: Spread
    to_threshold: dict[str, float]
    ratios: dict[str, Spread]
    step_seconds: dict[str, float]
    seconds_per_step: float
    tokens_per_step: float
    speedup_per_step: float
    peak_bytes: dict[str, float]
    peak: float
    memory_ratio: float


def summarise(run: Run) -> list[ArmSummary]:
    """One summary per arm, in the order of run.arms."""
    empty = Arm("", 0, 0, [])  # without costs, so that every ratio to it is NaN
    baseline = next((arm for arm in run.arms if arm.name == run.baseline), empty)
    return [_summarise_arm(run, arm, baseline) for arm in run.arms]


def _summarise_arm(run: Run, arm: Arm, baseline: Arm) -> ArmSummary:
    values = [known(number(r, "metrics", run.report.metric) for r in s.evals) for s in arm.seeds]
    values = [series for series in values if series]
    better = max if run.report.higher_is_better else min
    finals = [series[-1] for series in values]
    bests = [better(series) for series in values]

    own, base = _costs(run, arm), _costs(run, baseline)
    to_threshold, ratios = {}, {}
    for cost in COSTS:
        to_threshold[cost] = _median(own, cost)
        by_seed = known(_divide(base[k][cost], own[k][cost]) for k in own if k in base)
        middle = _divide(_median(base, cost), to_threshold[cost])
        ratios[cost] = _spread(middle, by_seed)

    seconds, peaks = _step_costs(arm)
    base_seconds, base_peaks = _step_costs(baseline)
    per_step = _total(seconds)
    peak = _highest(peaks)
    return ArmSummary(
        name=arm.name,
        max_new_tokens=arm.max_new_tokens,
        seeds=len(arm.seeds),
        evaluated=len(own),
        reached=sum(math.isfinite(cost["steps"]) for cost in own.values()),
        final=_spread(_mean(finals), finals),
        best=_spread(_mean(bests), bests),
        to_threshold=to_threshold,
        ratios=ratios,
        step_seconds=seconds,
        seconds_per_step=per_step,
        tokens_per_step=_mean(_mean(number(r, "tokens") for r in s.metrics) for s in arm.seeds),
        speedup_per_step=_divide(_total(base_seconds), per_step),
        peak_bytes=peaks,
        peak=peak,
        memory_ratio=_divide(_highest(base_peaks), peak),
    )


def _first_passing(run: Run, seed: Seed) -> dict[str, float] | None:
    """Cost of the first evaluation at or past the threshold; None if the metric was never measured.

    No interpolation between evaluations. Infinity in each cost where no evaluation passes.
    """
    measured = [row for row in seed.evals if known([number(row, "metrics", run.report.metric)])]
    if not measured:
        return None
    for row in measured:
        if run.passes(number(row, "metrics", run.report.metric)):
            return {
                "seconds": number(row, "train_seconds"),
                "tokens": number(row, "tokens"),
                "steps": number(row, "step"),
            }
    return dict.fromkeys(COSTS, math.inf)


def _costs(run: Run, arm: Arm) -> dict[int, dict[str, float]]:
    found = {seed.number: _first_passing(run, seed) for seed in arm.seeds}
    return {k: cost for k, cost in found.items() if cost is not None}


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


def _spread(middle: float, values: list[float]) -> Spread:
    if not values:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread(middle, min(values), max(values), len(values))


def _total(by_phase: dict[str, float]) -> float:
    kept = known(by_phase.values())
    return sum(kept) if kept else math.nan


def _highest(by_phase: dict[str, float]) -> float:
    return max(known(by_phase.values()), default=math.nan)


def _median(costs: dict[int, dict[str, float]], cost: str) -> float:
    kept = known(seed[cost] for seed in costs.values())
    return statistics.median(kept) if kept else math.nan


def _mean(values: Iterable[float]) -> float:
    """Mean of the known values; NaN where there is none."""
    kept = known(values)
    return statistics.fmean(kept) if kept else math.nan


def _divide(numerator: float, denominator: float) -> float:
    """numerator / denominator where both are positive and finite, else NaN."""
    usable = all(math.isfinite(value) and value > 0 for value in (numerator, denominator))
    return numerator / denominator if usable else math.nan
