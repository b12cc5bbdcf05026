"""The outcome of a comparison in sentences, computed from its numbers."""

from __future__ import annotations

import math

from esr_train.report.results import Run, label
from esr_train.report.summary import ArmSummary, Spread


def headline(run: Run, summaries: list[ArmSummary]) -> str:
    """A few sentences on the arm, other than the baseline, that reached the threshold first."""
    base, others = _apart(run, summaries)
    best = _quickest(others)
    text = _sentence(run, best, base)
    if len(others) > 1 and math.isfinite(_soonest(best)):
        beside = f" beside {base.name}" if base else ""
        text = f"Of {len(others)} arms{beside}, {best.name} is the quickest: {text}"
    if len(others) > 1 and base is None:
        text += " report.baseline names no arm, so there are no ratios between arms."
    return text


def verdicts(run: Run, summaries: list[ArmSummary]) -> list[str]:
    """A sentence on each of the other arms, from the shortest rollouts to the longest."""
    base, others = _apart(run, summaries)
    best = _quickest(others)
    return [_sentence(run, item, base) for item in others if item is not best]


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


def _sentence(run: Run, arm: ArmSummary, base: ArmSummary | None) -> str:
    if not arm.evaluated:
        return f"{arm.name} has no evaluation of {run.report.metric}."
    if base is None:
        return f"{arm.name} {_alone(run, arm)}; it ends at {between(arm.final)}."
    if not base.evaluated:
        return (
            f"{arm.name} {_alone(run, arm)}; {base.name} has no evaluation of "
            f"{run.report.metric}, so there is nothing to compare it with."
        )
    arm_there = math.isfinite(arm.to_threshold["steps"])
    base_there = math.isfinite(base.to_threshold["steps"])
    if arm_there and base_there:
        text = _both(run, arm, base)
    elif arm_there:
        text = f"{arm.name} {_alone(run, arm)}; {base.name} does not ({_end(base)})."
    elif base_there:
        text = f"{arm.name} does not reach {target(run)} ({_end(arm)}); {base.name} does: it "
        text += f"{_alone(run, base)}."
    else:
        text = (
            f"Neither {arm.name} ({_end(arm)}) nor {base.name} ({_end(base)}) reaches "
            f"{target(run)}."
        )
    if not (arm_there and base_there):
        text += _per_step(arm, base)
    return f"{text} {_finals(run, arm, base)}"


def _both(run: Run, arm: ArmSummary, base: ArmSummary) -> str:
    if 0 in (arm.to_threshold["steps"], base.to_threshold["steps"]):
        return (
            f"The student meets {target(run)} before any training, so {arm.name} and {base.name} "
            "cannot be told apart by the time they take to get there."
        )
    time = arm.ratios["seconds"]
    speed = _times(time.middle, "faster than", "slower than", "as fast as")
    took = f"{plain(arm.to_threshold['seconds'])} s against {plain(base.to_threshold['seconds'])} s"
    text = f"{arm.name} is {speed} {base.name} to {target(run)} ({took} of training time), with "
    parts = [
        _times(arm.ratios["tokens"].middle, "fewer", "more", "as many") + " generated tokens",
        _times(arm.ratios["steps"].middle, "fewer", "more", "as many") + " steps",
    ]
    if not math.isnan(arm.memory_ratio):
        lower = _times(arm.memory_ratio, "lower", "higher", "the same")
        parts.append(f"{lower} peak memory")
    text += f"{', '.join(parts[:-1])} and {parts[-1]}; "
    if max(arm.evaluated, base.evaluated) == 1:
        return text + "1 seed, so the spread is unknown."
    text += f"median of {_seeds(arm.evaluated)}"
    if time.count > 1:
        text += (
            f", {base.name}'s time over {arm.name}'s from {ratio(time.low)} to {ratio(time.high)}"
        )
    if arm.reached < arm.evaluated or base.reached < base.evaluated:
        text += (
            f"; {arm.reached} of {arm.evaluated} ({arm.name}) and {base.reached} of "
            f"{base.evaluated} ({base.name}) seeds got there"
        )
    return text + "."


def _alone(run: Run, arm: ArmSummary) -> str:
    """Whether and when one arm reaches the threshold, as a predicate."""
    if not math.isfinite(arm.to_threshold["steps"]):
        return f"does not reach {target(run)} ({_end(arm)})"
    return (
        f"reaches {target(run)} after {plain(arm.to_threshold['seconds'])} s of training and "
        f"{plain(arm.to_threshold['tokens'])} generated tokens "
        f"({arm.reached} of {_seeds(arm.evaluated)} got there)"
    )


def _end(arm: ArmSummary) -> str:
    there = f", {arm.reached} of {_seeds(arm.evaluated)} got there" if arm.reached else ""
    return f"best {_level(arm.best.middle)}, final {_level(arm.final.middle)}{there}"


def _per_step(arm: ArmSummary, base: ArmSummary) -> str:
    step = _times(arm.speedup_per_step, "faster than", "slower than", "as fast as")
    if not step:
        return ""
    text = f" A step of {arm.name} is {step} one of {base.name}"
    memory = _times(arm.memory_ratio, "lower", "higher", "the same")
    return text + (f", with {memory} peak memory." if memory else ".")


def _finals(run: Run, arm: ArmSummary, base: ArmSummary) -> str:
    return (
        f"At the end of training, {label(run.report.metric)} is {between(arm.final)} for "
        f"{arm.name} and {between(base.final)} for {base.name}."
    )
