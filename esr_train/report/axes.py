"""What the figures of a report share: style and colours, the curves of arms, axes and legends.

Every size is in CSS pixels of a page 800 wide; the PNG has twice as many in each direction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from esr_train.report.results import Arm, Run, Seed, known, number, shorten

Curve = tuple[np.ndarray, np.ndarray]

# Okabe-Ito, distinguishable with any colour vision; the baseline is black. In grey print, line
# style and marker tell arms apart.
_ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BASELINE_COLOUR = "#222222"
_LINE_STYLES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_MOST_MARKERS = 9  # on a line
# One hue in three lightnesses: distinct in grey print, and not mistaken for an arm.
PHASE_COLOURS = {"rollout": "#3B4A6B", "teacher": "#7F93B8", "student": "#C6D0E3"}
QUIET = "#6B6B6B"
STYLE: dict[Any, Any] = {
    # Names and metrics are shown as they are; a dollar sign starts no formula.
    "text.parse_math": False,
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8A8A8A",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}
_CSS_DPI = 100
# Beyond this ratio of largest to smallest, a linear axis hides the small end.
LOG_RANGE = 20.0


def band(curves: list[Curve], held: list[bool]) -> tuple[np.ndarray, ...]:
    """Grid, mean, minimum and maximum over seeds.

    The grid is the union of the seeds' own points; between them a seed is interpolated linearly.
    After its last point a seed keeps its value if `held` (it was finished), else it is left out.
    """
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    lines = [
        np.interp(grid, xs, ys, left=np.nan, right=ys[-1] if keep else np.nan)
        for (xs, ys), keep in zip(curves, held, strict=True)
    ]
    # Each grid point belongs to some seed, so no column is all NaN.
    stacked = np.stack(lines)  # [seeds, points]
    low, high = np.nanmin(stacked, axis=0), np.nanmax(stacked, axis=0)
    return grid, np.nanmean(stacked, axis=0), low, high


def curve(rows: list[dict[str, Any]], x: tuple[str, ...], y: tuple[str, ...]) -> Curve:
    """Points of one seed with both coordinates known, sorted by x."""
    points = [(number(row, *x), number(row, *y)) for row in rows]
    kept = sorted(point for point in points if len(known(point)) == 2)
    xs, ys = zip(*kept, strict=True) if kept else ((), ())
    return np.array(xs, dtype=float), np.array(ys, dtype=float)


def _look(run: Run, arm: Arm) -> dict[str, Any]:
    """Colour, line style and marker of an arm; 42 arms before two look the same."""
    if arm.name == run.baseline:
        return {"color": _BASELINE_COLOUR, "linestyle": "-", "marker": None}
    place = run.arms.index(arm)
    return {
        "color": _ARM_COLOURS[place % len(_ARM_COLOURS)],
        "linestyle": _LINE_STYLES[place % len(_LINE_STYLES)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "markersize": 4.5,
    }


def new_figure(width: int, height: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An Agg figure of width x height CSS pixels with a row of axes."""
    figure = Figure(figsize=(width / _CSS_DPI, height / _CSS_DPI), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=2 * _CSS_DPI, facecolor="white")
    return path


def legend(figure: Figure, handles: dict[str, Any]) -> None:
    """Legend above the axes, in the given order, in as many columns as fit."""
    names = [shorten(name, 40) for name in handles]
    entry = 60 + 7 * max(len(name) for name in names)  # CSS pixels: line, gap, letters
    columns = max(1, int(figure.get_figwidth() * _CSS_DPI / entry))
    figure.set_figheight(figure.get_figheight() + 0.18 * ((len(names) - 1) // columns))
    figure.legend(
        list(handles.values()),
        names,
        loc="outside upper left",
        ncols=columns,
        columnspacing=1.4,
        handlelength=3.0,
    )


def draw_arms(
    run: Run, axis: Axes, curve_of: Callable[[Seed], Curve]
) -> tuple[dict[str, Any], list[float]]:
    """Mean line and min-max band of each arm; returns the lines by arm and all x values."""
    lines: dict[str, Any] = {}
    seen: list[float] = []
    for arm in run.arms:
        pairs = [(curve_of(seed), arm.finished(seed)) for seed in arm.seeds]
        pairs = [(curve, done) for curve, done in pairs if len(curve[0])]
        if not pairs:
            continue
        grid, middle, low, high = band([curve for curve, _ in pairs], [done for _, done in pairs])
        look = _look(run, arm)
        if len(grid) == 1:  # one point alone makes no line
            look["marker"] = look["marker"] or "o"
        every = max(1, -(-len(grid) // _MOST_MARKERS))
        (line,) = axis.plot(grid, middle, **look, markevery=every)
        if len(pairs) > 1:
            axis.fill_between(grid, low, high, color=look["color"], alpha=0.16, linewidth=0)
        lines[arm.name] = line
        seen.extend(grid.tolist())
    return lines, seen


def make_logarithmic(axis: Axes, values: list[float]) -> bool:
    """Make x logarithmic if its range is large; x = 0 is then not shown."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) / min(positive) <= LOG_RANGE:
        return False
    axis.set_xscale("log", nonpositive="mask")
    axis.set_xlim(left=0.8 * min(positive))
    return True


def bar_axis(axis: Axes, names: list[str], x_label: str) -> None:
    axis.set_yticks(range(len(names)), [shorten(name, 24) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.2)
    axis.set_xlim(left=0)
    axis.set_xlabel(x_label)
