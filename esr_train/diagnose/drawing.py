"""What the figures of a diagnosis share.

They read in black and white: each line has a marker, dashes and a lightness of its own, each part
of a bar a hatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esr_train.diagnose.intervals import Interval
from esr_train.report.axes import QUIET, STYLE, legend, new_figure, save
from esr_train.report.figures import Picture

# Okabe-Ito, from dark to light.
_LINES = (
    ("#222222", "o", "-"),
    ("#0072B2", "s", "--"),
    ("#D55E00", "^", "-."),
    ("#009E73", "D", ":"),
    ("#CC79A7", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#E69F00", "P", (0, (1, 1))),
    ("#56B4E9", "X", (0, (8, 2))),
    ("#8A8A8A", "*", "-"),
    ("#7A1E48", "<", (0, (1, 3))),
    ("#3B4A6B", ">", (0, (3, 1, 1, 1))),
)
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
FILLS = ("#4A4A4A", "#9DBAD5", "#E8E8E8", "#D8A27A", "#B9D8C9", "#F2D9B0")


def figure(height: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width; draw inside `styled`."""
    return new_figure(800, height, columns)


def styled() -> Any:
    return matplotlib.rc_context(STYLE)


def picture(
    drawn: Figure, handles: dict[str, Any], folder: Path, name: str, texts: tuple[str, str]
) -> Picture:
    """Write a figure with the legend `handles`; `texts` are title and caption."""
    if handles:
        legend(drawn, handles)
    folder.mkdir(parents=True, exist_ok=True)
    return Picture(save(drawn, folder / f"{name}.png"), *texts, wide=True)


def draw_line(axis: Axes, xs: Sequence[float], found: Sequence[Interval], style: int) -> Any:
    """Means with their intervals as bars; what is unknown is left out. None if all is."""
    colour, marker, dashes = _LINES[style % len(_LINES)]
    points = [(x, f) for x, f in zip(xs, found, strict=True) if f["mean"] is not None]
    if not points:
        return None
    at = [x for x, _ in points]
    means = [f["mean"] for _, f in points]
    axis.vlines(
        at,
        [f["mean"] if f["low"] is None else f["low"] for _, f in points],
        [f["mean"] if f["high"] is None else f["high"] for _, f in points],
        color=colour,
        linewidth=1.1,
        alpha=0.8,
    )
    (line,) = axis.plot(
        at, means, color=colour, marker=marker, markersize=4.5, linestyle=dashes, linewidth=1.4
    )
    return line


def draw_curve(axis: Axes, xs: Sequence[float], ys: Sequence[float], style: int) -> Any:
    """A line without intervals."""
    colour, marker, dashes = _LINES[style % len(_LINES)]
    (line,) = axis.plot(
        xs, ys, color=colour, marker=marker, markersize=4.5, linestyle=dashes, linewidth=1.4
    )
    return line


def draw_dots(axis: Axes, found: Sequence[Interval], style: int) -> None:
    """Means with their intervals, one below the other."""
    colour, marker, _ = _LINES[style % len(_LINES)]
    for place, x in enumerate(found):
        if x["mean"] is None:
            continue
        if x["low"] is not None:
            axis.hlines(place, x["low"], x["high"], color=colour, linewidth=1.4)
        axis.plot(x["mean"], place, color=colour, marker=marker, markersize=5)


def shifted(xs: Sequence[float], line: int, lines: int, step: float = 0.05) -> list[float]:
    """`xs` moved a little, by a share of themselves, so that bars of several lines stay apart."""
    return [x * (1 + step * (line - (lines - 1) / 2)) for x in xs]


def position_axis(axis: Axes, edges: Sequence[int], columns: int = 1) -> list[float]:
    """Make x the position of a token, from 1, on a log scale; returns the middles of the bins.

    In a figure of several columns there is room for six ticks.
    """
    axis.set_xscale("log", base=2)
    powers = max(edges).bit_length()
    every = 1 if columns == 1 else -(-powers // 6)
    ticks = [2**i for i in range(0, powers, every) if 2**i <= max(edges)]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(0.8, max(edges) * 1.25)
    axis.set_xlabel("position (tokens, log scale)")
    return [float(np.sqrt((low + 1) * high)) for low, high in zip(edges, edges[1:], strict=False)]


def mark_position(axis: Axes, position: float, text: str) -> None:
    """A vertical line with a name at its top."""
    axis.axvline(position, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        text,
        (position, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=QUIET,
    )


def mark_level(axis: Axes, level: float) -> None:
    axis.axhline(level, color=QUIET, linewidth=1, zorder=1)


def plain(found: Interval, digits: int = 3) -> str:
    """0.512 (0.431 to 0.593)."""
    if found["mean"] is None:
        return "-"
    # + 0.0: no "-0.00"
    mean, low, high = (
        None if found[key] is None else f"{round(found[key], digits) + 0.0:.{digits}f}"
        for key in ("mean", "low", "high")
    )
    return str(mean) if low is None else f"{mean} ({low} to {high})"


def verdict(found: Interval) -> str:
    """Where an interval lies: "below 0", "above 0", "not told from 0", "unknown"."""
    if found["low"] is None:
        return "unknown: too few problems"
    if found["high"] < 0:
        return "below 0"
    return "above 0" if found["low"] > 0 else "not told from 0"
