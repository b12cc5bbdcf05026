"""The tables of a report: their cells, and their layout as plain text and Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from esr_train.report.headline import between, plain, ratio, target
from esr_train.report.results import Run, label, shorten
from esr_train.report.statistics import COSTS, LEVEL, RESAMPLES
from esr_train.report.summary import PHASES, ArmSummary, Spread
from esr_train.report.tuning import read_tuning

Table = list[list[str]]  # rows of cells, the header first

WIDTH = 100  # columns of a terminal
_NAME_WIDTH = 16  # of an arm in a terminal


def tables(run: Run, summaries: list[ArmSummary]) -> list[tuple[str, Table]]:
    """Every table with its title."""
    found = [
        (label(run.report.metric).capitalize(), _level_table(summaries)),
        (f"To {target(run)}", _goal_table(run, summaries)),
    ]
    if run.baseline:
        found.append(
            (f"Costs of {run.baseline} over those of an arm", _ratio_table(run, summaries))
        )
        for cost, words in (("seconds", "training time"), ("tokens", "generated tokens")):
            found.append((f"At equal {words}", _equal_table(run, summaries, cost)))
    found.append(("How runs end", _stability_table(summaries)))
    found.append(("A step", _step_table(run, summaries)))
    if any(arm.config.teacher.url or arm.config.rollout.url for arm in run.arms):
        found.append(("Engines", _engine_table(run)))
    tuning = read_tuning(run.path)
    if tuning is not None:
        seeds = ", ".join(map(str, tuning["seeds"]))
        found.append((f"Learning rates, on validation seeds {seeds}", _rate_table(tuning)))
    return found


def table_note(run: Run) -> str:
    """How to read the tables."""
    text = (
        "Metrics are means (lowest to highest seed); best is the best evaluation of each run on "
        "the problems that are reported, which flatters runs that are evaluated often. Costs to "
        "the threshold are medians over seeds, interpolated between the evaluation before it and "
        "the first at or past it, which the brackets give; a seed that never gets there counts as "
        "infinite. "
    )
    if run.baseline:
        text += (
            f"Ratios are {run.baseline}'s cost over the arm's, so 4.0 means four times less, with "
            f"a {LEVEL:.0%} percentile bootstrap interval of {RESAMPLES:,} resamples, paired over "
            "seeds: with few seeds it is rough. Values at equal cost are taken where the cheaper "
            "run of each pair of seeds ends, interpolated between evaluations. In brackets after "
            f"what a step costs: {run.baseline}'s cost divided by it. "
        )
    text += (
        "Drop is from the best to the final value of a run. Ended is the share of sampled answers "
        "that end by themselves, in the last evaluation (the others run to eval.max_new_tokens) "
        "and in the last rollout. A step's seconds and tokens are means over steps and seeds, its "
        "peak memory is the highest."
    )
    tuning = read_tuning(run.path)
    return text + (f" Rule of the learning rates: {tuning['rule']}" if tuning else "")


def as_columns(table: Table) -> str:
    """Aligned columns for a terminal; long names of arms are cut."""
    cut = [[shorten(row[0], _NAME_WIDTH), *row[1:]] for row in table]
    widths = [max(len(row[i]) for row in cut) for i in range(len(cut[0]))]
    lines = []
    for row in cut:
        cells = [row[0].ljust(widths[0])]
        for head, cell, width in zip(table[0][1:], row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width) if head else cell)  # a column of words has no head
        lines.append("  ".join(cells).rstrip()[:WIDTH])
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    rule = ["---"] + ["---:"] * (len(table[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [escaped[0], rule, *escaped[1:]])


def _level_table(summaries: list[ArmSummary]) -> Table:
    """The metric at the start, the end and at its best, one row per arm."""
    table = [["arm", "start", "final", "best", "seeds"]]
    for item in summaries:
        levels = (item.start, item.final, item.best)
        table.append([item.name, *map(between, levels), str(item.evaluated)])
    return table


def _goal_table(run: Run, summaries: list[ArmSummary]) -> Table:
    """The cost of reaching the threshold, one row per arm."""
    table = [["arm", "there", "seconds", "generated tokens", "steps"]]
    for item in summaries:
        row = [item.name, f"{item.reached} of {item.evaluated}"]
        for cost in COSTS:
            text, (after, by) = plain(item.to_threshold[cost]), item.bracket[cost]
            if math.isfinite(item.to_threshold[cost]):
                text += f" ({plain(after)} to {plain(by)})"
            row.append(text)
        table.append(row)
    return table


def _ratio_table(run: Run, summaries: list[ArmSummary]) -> Table:
    table = [["arm", "seeds", "seconds", "generated tokens", "steps"]]
    for item in summaries:
        if item.name != run.baseline:
            ratios = [item.ratios[cost] for cost in COSTS]
            cells = [_with_interval(found, ratio(found.middle), ratio) for found in ratios]
            table.append([item.name, str(ratios[0].count), *cells])
    return table


def _equal_table(run: Run, summaries: list[ArmSummary], cost: str) -> Table:
    table = [["arm", {"seconds": "s", "tokens": "tokens"}[cost], "arm there", "baseline there",
              "difference"]]  # fmt: skip
    for item in summaries:
        if item.name != run.baseline:
            at = item.at_equal[cost]
            difference = f"{at.difference.middle:+.3f}" if at.difference.count else "-"
            table.append(
                [
                    item.name,
                    plain(at.cost),
                    plain(at.own.middle),
                    plain(at.base.middle),
                    _with_interval(at.difference, difference, lambda value: f"{value:+.3f}"),
                ]
            )
    return table


def _with_interval(found: Spread, text: str, each: Callable[[float], str]) -> str:
    if math.isnan(found.low):
        return text
    return f"{text} ({each(found.low)} to {each(found.high)})"


def _stability_table(summaries: list[ArmSummary]) -> Table:
    table = [["arm", "drop from the best", "end below their start", "ended", "ended in rollouts"]]
    for item in summaries:
        end = item.stability
        table.append(
            [
                item.name,
                between(end.drop) if item.evaluated else "-",
                f"{end.below_start} of {item.evaluated}",
                plain(end.eos_rate),
                plain(end.rollout_eos_rate),
            ]
        )
    return table


def _rate_table(tuning: dict[str, Any]) -> Table:
    """The whole grid; the chosen rate of each arm is marked."""
    table = [["arm", "rate", "final", "mean of evaluations", "gain kept", ""]]
    for name, arm in tuning["arms"].items():
        for rate in arm["rates"]:
            seeds = rate["ends"]
            said = [f"unstable: {rate['unstable']}"] if rate["unstable"] else []
            if rate["rate"] == arm["chosen"]:
                said = ["chosen", *said, *([arm["note"]] if arm["note"] else [])]
            numbers = [math.nan if rate[key] is None else rate[key] for key in ("mean", "kept")]
            final = (
                Spread(rate["end"] or 0.0, min(seeds), max(seeds), len(seeds)) if seeds else None
            )
            table.append(
                [
                    name,
                    f"{rate['rate']:g}",
                    between(final) if final else "-",
                    *(plain(number) for number in numbers),
                    "; ".join(said),
                ]
            )
    return table


def _step_table(run: Run, summaries: list[ArmSummary]) -> Table:
    """What a step costs, one row per arm."""
    table = [["arm", *(f"{phase} s" for phase in PHASES), "all s", "tokens", "peak memory"]]
    for item in summaries:
        row = [item.name, *(plain(item.step_seconds[phase]) for phase in PHASES)]
        seconds = plain(item.seconds_per_step)
        row.append(_with_ratio(run, item, seconds, item.speedup_per_step))
        row.append(plain(item.tokens_per_step))
        row.append(_with_ratio(run, item, _size(item.peak), item.memory_ratio))
        table.append(row)
    return table


def _engine_table(run: Run) -> Table:
    """Where the answers of each arm were sampled, and where its teacher is."""
    table = [["arm", "rollouts", "teacher"]]
    for arm in run.arms:
        source, teacher = arm.config.rollout.source, arm.config.teacher
        whose = "student of each step" if source == "student" else source
        engines = sorted({str(r["engine"]) for s in arm.seeds for r in s.metrics if "engine" in r})
        where = f"server at {teacher.url}, {teacher.logprobs} log-probs" if teacher.url else ""
        rollouts = " and ".join(engines or ["esr_train"])
        table.append([arm.name, f"{rollouts}; {whose}", where or "in the run's process"])
    return table


def _with_ratio(run: Run, item: ArmSummary, text: str, share: float) -> str:
    """A cost with its ratio in brackets, unless it is the baseline's own."""
    return text if item.name == run.baseline or math.isnan(share) else f"{text} ({ratio(share)}x)"


def _size(count: float) -> str:
    """Bytes in the unit that fits."""
    if math.isnan(count):
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
