"""The tables of a report: their cells, and their layout as plain text and Markdown."""

from __future__ import annotations

import math

from esr_train.report.headline import between, plain, ratio, target
from esr_train.report.results import Run, label, shorten
from esr_train.report.summary import COSTS, PHASES, ArmSummary

Table = list[list[str]]  # rows of cells, the header first

WIDTH = 100  # columns of a terminal
_NAME_WIDTH = 18  # of an arm in a terminal


def tables(run: Run, summaries: list[ArmSummary]) -> list[tuple[str, Table]]:
    """Every table with its title."""
    return [
        (label(run.report.metric).capitalize(), _level_table(summaries)),
        (f"To {target(run)}", _goal_table(run, summaries)),
        ("A step", _step_table(run, summaries)),
    ]


def table_note(run: Run) -> str:
    """How to read the tables."""
    brackets = (
        f"In brackets after a cost: {run.baseline}'s cost divided by it, so (4.0x) means four "
        "times less. "
    )
    return (brackets if run.baseline else "") + (
        "Costs to the threshold are medians over seeds, read off the first evaluation at or past "
        "it; a seed that never gets there counts as infinite. Metrics are means (lowest to highest "
        "seed). A step's seconds and tokens are means over steps and seeds, its peak memory is the "
        "highest."
    )


def as_columns(table: Table) -> str:
    """Aligned columns for a terminal; long names of arms are cut."""
    cut = [[shorten(row[0], _NAME_WIDTH), *row[1:]] for row in table]
    widths = [max(len(row[i]) for row in cut) for i in range(len(cut[0]))]
    lines = []
    for row in cut:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip()[:WIDTH])
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    rule = ["---"] + ["---:"] * (len(table[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [escaped[0], rule, *escaped[1:]])


def _level_table(summaries: list[ArmSummary]) -> Table:
    """The metric at the end and at its best, one row per arm."""
    table = [["arm", "final", "best", "seeds"]]
    for item in summaries:
        table.append([item.name, between(item.final), between(item.best), str(item.evaluated)])
    return table


def _goal_table(run: Run, summaries: list[ArmSummary]) -> Table:
    """The cost of reaching the threshold, one row per arm."""
    table = [["arm", "seeds there", "seconds", "generated tokens", "steps"]]
    for item in summaries:
        row = [item.name, f"{item.reached} of {item.evaluated}"]
        for cost in COSTS:
            text = plain(item.to_threshold[cost])
            row.append(_with_ratio(run, item, text, item.ratios[cost].middle))
        table.append(row)
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


def _with_ratio(run: Run, item: ArmSummary, text: str, share: float) -> str:
    """A cost with its ratio in brackets, unless it is the baseline's own."""
    return text if item.name == run.baseline or math.isnan(share) else f"{text} ({ratio(share)}x)"


def _size(count: float) -> str:
    """Bytes in the unit that fits."""
    if math.isnan(count):
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
