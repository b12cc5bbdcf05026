"""The outcome of a comparison in sentences, computed from its numbers.

There is no ratio in them unless `missing` is empty: rates chosen per arm, enough seeds, and the
mask-only arm beside one that truncates.
"""

from __future__ import annotations

import math

from esr_train.report.results import Arm, Run, label
from esr_train.report.summary import ArmSummary, Spread
from esr_train.report.tuning import not_tuned

# Seeds that a ratio needs: of a model organism, and of a language model.
SEEDS_OF_ORGANISM, SEEDS = 5, 3


def headline(run: Run, summaries: list[ArmSummary]) -> str:
    """A few sentences on the arm, other than the baseline, that reached the threshold first."""
    base, others = _apart(run, summaries)
    best = _quickest(others)
    if base is None:
        text = _sentence(run, best, None)
        if len(others) > 1:
            if math.isfinite(_soonest(best)):
                text = f"Of {len(others)} arms, {best.name} is the quickest: {text}"
            text += " report.baseline names no arm, so there are no ratios between arms."
        return text
    lacking = missing(run, best, base)
    text = _sentence(run, best, base, with_ratios=not lacking)
    if len(others) > 1 and math.isfinite(_soonest(best)):
        text = f"Of {len(others)} arms beside {base.name}, {best.name} is the quickest: {text}"
    masked = mask_only(run, best.name)
    if masked is not None:
        beside = next(item for item in summaries if item.name == masked.name)
        alone = _sentence(run, beside, base, with_ratios=not lacking, ends=False)
        text += f" Beside it the mask-only arm, whose rollouts are full: {alone}"
    if lacking:
        return f"No headline ratio: {'; '.join(lacking)}. {text}"
    return text


def verdicts(run: Run, summaries: list[ArmSummary]) -> list[str]:
    """A sentence on each of the other arms, from the shortest rollouts to the longest."""
    base, others = _apart(run, summaries)
    best = _quickest(others)
    return [
        _sentence(run, item, base, base is not None and not missing(run, item, base))
        for item in others
        if item is not best
    ]


def missing(run: Run, arm: ArmSummary, base: ArmSummary) -> list[str]:
    """What a ratio between two arms lacks to be a headline."""
    lacking = []
    reason = not_tuned(run)
    if reason:
        lacking.append(reason)
    needed = SEEDS_OF_ORGANISM if is_organism(run) else SEEDS
    seeds = min(arm.ratios["seconds"].count, base.evaluated)
    if seeds < needed:
        lacking.append(f"{_seeds(seeds)} of both arms, of {needed} that are needed")
    if _truncates(_arm(run, arm.name), _arm(run, base.name)) and not mask_only(run, arm.name):
        lacking.append(
            f"no mask-only arm beside {arm.name} (rollouts as long as {base.name}'s, the loss on "
            f"their first {arm.max_new_tokens} tokens)"
        )
    return lacking


def is_organism(run: Run) -> bool:
    """Whether the models were built for a task of this package."""
    return run.config.student.model.startswith("builtin:") or run.config.data.task == "sums"


def mask_only(run: Run, name: str) -> Arm | None:
    """The arm with the baseline's rollouts that trains on the tokens that another one samples."""
    base = next((arm for arm in run.arms if arm.name == run.baseline), None)
    arm = _arm(run, name)
    if base is None or not _truncates(arm, base):
        return None
    for other in run.arms:
        loss = other.config.loss
        masked = loss.window == "first" and loss.window_tokens == arm.max_new_tokens
        if masked and other.max_new_tokens == base.max_new_tokens:
            return other
    return None


def _truncates(arm: Arm, base: Arm) -> bool:
    """Whether an arm differs from the baseline in that its rollouts end earlier."""
    loss = arm.config.loss
    whole = loss.window_tokens is None and arm.config.rollout.grow_from is None
    return whole and arm.max_new_tokens < base.max_new_tokens


def _arm(run: Run, name: str) -> Arm:
    return next(arm for arm in run.arms if arm.name == name)


def _apart(run: Run, summaries: list[ArmSummary]) -> tuple[ArmSummary | None, list[ArmSummary]]:
    """The baseline, or None, and the other arms."""
    base = next((item for item in summaries if item.name == run.baseline), None)
    return base, [item for item in summaries if item is not base]


def _quickest(others: list[ArmSummary]) -> ArmSummary:
    """The first arm at the threshold; if none reaches it, the one with the longest rollouts."""
    return min(others, key=lambda item: (_soonest(item), -item.max_new_tokens))


def target(run: Run) -> str:
    """The threshold in words."""
    direction = "" if run.report.higher_is_better else " or less"
    return f"{label(run.report.metric)} {run.report.threshold:g}{direction}"


def plain(value: float, digits: int = 3) -> str:
    """A number with thousands separators and `digits` significant digits below 1000."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "not reached"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def ratio(value: float) -> str:
    """A ratio, with two decimals below 2."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "without limit"
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _level(value: float) -> str:
    """A value of the metric: three decimals, unless it is too small or too large for them."""
    return f"{value:.3f}" if 0.01 <= abs(value) < 10 else plain(value)


def between(spread: Spread) -> str:
    """A mean with its extremes over seeds."""
    if spread.count < 2:
        return _level(spread.middle)
    return f"{_level(spread.middle)} ({_level(spread.low)} to {_level(spread.high)})"


def _times(value: float, less: str, more: str, same: str) -> str:
    """ "4.1 times <less>" for baseline / arm = 4.1, "4.1 times <more>" for its inverse."""
    if math.isnan(value):
        return ""
    if abs(value - 1) < 0.005:
        return same
    return f"{ratio(value)} times {less}" if value > 1 else f"{ratio(1 / value)} times {more}"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _soonest(item: ArmSummary) -> float:
    """Median seconds to the threshold; infinity where unknown, so that it sorts last."""
    value = item.to_threshold["seconds"]
    return math.inf if math.isnan(value) else value


def _sentence(
    run: Run,
    arm: ArmSummary,
    base: ArmSummary | None,
    with_ratios: bool = False,
    ends: bool = True,
) -> str:
    if not arm.evaluated:
        return f"{arm.name} has no evaluation of {run.report.metric}."
    if base is None:
        return f"{arm.name} {_alone(run, arm)}; {_ends(run, arm)}."
    if not base.evaluated:
        return (
            f"{arm.name} {_alone(run, arm)}; {base.name} has no evaluation of "
            f"{run.report.metric}, so there is nothing to compare it with."
        )
    arm_there = math.isfinite(arm.to_threshold["steps"])
    base_there = math.isfinite(base.to_threshold["steps"])
    if 0 in (arm.to_threshold["steps"], base.to_threshold["steps"]):
        text = (
            f"The student meets {target(run)} before any training, so {arm.name} and {base.name} "
            "cannot be told apart by the time they take to get there."
        )
    elif arm_there and base_there and with_ratios:
        text = _ratios(run, arm, base)
    elif not (arm_there or base_there):
        text = (
            f"Neither {arm.name} ({_end(arm)}) nor {base.name} ({_end(base)}) reaches "
            f"{target(run)}."
        )
    else:
        text = f"{arm.name} {_alone(run, arm)}; {base.name} {_alone(run, base)}."
    return f"{text} {_finals(run, arm, base)}" if ends else text


def _ratios(run: Run, arm: ArmSummary, base: ArmSummary) -> str:
    """Both arms reach the threshold: time, tokens and steps, with intervals."""
    parts = []
    for cost, less, more, same, what in (
        ("seconds", "faster than", "slower than", "as fast as", ""),
        ("tokens", "fewer", "more", "as many", " generated tokens"),
        ("steps", "fewer", "more", "as many", " steps"),
    ):
        found = arm.ratios[cost]
        low, high = found.low, found.high
        if found.middle < 1:  # as it is worded, the other way round
            low, high = _inverse(high), _inverse(low)
        limits = f" (95 % interval {ratio(low)} to {ratio(high)})"
        words = _times(found.middle, less, more, same)
        parts.append(words + (f" {base.name}" if cost == "seconds" else what) + limits)
    rates = ", ".join(
        f"{item.name} {_arm(run, item.name).config.optim.lr:g}" for item in (arm, base)
    )
    text = (
        f"{arm.name} is {parts[0]} to {target(run)}, {plain(arm.to_threshold['seconds'])} s "
        f"against {plain(base.to_threshold['seconds'])} s of training time, with {parts[1]} and "
        f"{parts[2]}; medians of {_seeds(arm.ratios['seconds'].count)}, each arm at the learning "
        f"rate that was chosen for it on validation seeds ({rates})"
    )
    if arm.reached < arm.evaluated or base.reached < base.evaluated:
        text += (
            f"; {arm.reached} of {arm.evaluated} ({arm.name}) and {base.reached} of "
            f"{base.evaluated} ({base.name}) seeds got there"
        )
    return text + "."


def _inverse(value: float) -> float:
    return math.inf if value == 0 else 1 / value


def _alone(run: Run, arm: ArmSummary) -> str:
    """Whether and when one arm reaches the threshold, as a predicate."""
    if not math.isfinite(arm.to_threshold["steps"]):
        return f"does not reach {target(run)} ({_end(arm)})"
    return (
        f"reaches {target(run)} after {plain(arm.to_threshold['seconds'])} s of training, "
        f"{plain(arm.to_threshold['tokens'])} generated tokens and "
        f"{plain(arm.to_threshold['steps'])} steps "
        f"({arm.reached} of {_seeds(arm.evaluated)} got there)"
    )


def _end(arm: ArmSummary) -> str:
    there = f", {arm.reached} of {_seeds(arm.evaluated)} got there" if arm.reached else ""
    return f"best {_level(arm.best.middle)}, final {_level(arm.final.middle)}{there}"


def _finals(run: Run, arm: ArmSummary, base: ArmSummary) -> str:
    text = f"{label(run.report.metric).capitalize()} of {arm.name} {_levels(arm)}; of {base.name} "
    text += f"{_levels(base)}."
    unstable = [
        f"{item.stability.below_start} of {_seeds(item.evaluated)} of {item.name}"
        for item in (arm, base)
        if item.stability.below_start
    ]
    return text + (f" Below where they began end {' and '.join(unstable)}." if unstable else "")


def _levels(arm: ArmSummary) -> str:
    return f"is {between(arm.final)} at the end and {between(arm.best)} at its best"


def _ends(run: Run, arm: ArmSummary) -> str:
    return f"it ends at {between(arm.final)}, and is {between(arm.best)} at its best"
