"""The figures of a report: PNG files of a run's curves and costs, drawn by matplotlib's Agg.

Every size is in CSS pixels of a page 800 wide; the PNG has twice as many in each direction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from esr_train.report.results import Arm, Run, Seed, known, label, number, shorten
from esr_train.report.summary import PHASES, ArmSummary

Curve = tuple[np.ndarray, np.ndarray]

# Okabe-Ito, distinguishable with any colour vision; the baseline is black.
_ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BASELINE_COLOUR = "#222222"
_LINE_STYLES = ("-", "--", ":", "-.")
# One hue in three lightnesses: distinct in grey print, and not mistaken for an arm.
_PHASE_COLOURS = {"rollout": "#3B4A6B", "teacher": "#7F93B8", "student": "#C6D0E3"}
_QUIET = "#6B6B6B"
_STYLE: dict[Any, Any] = {
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
_LOG_RANGE = 20.0

_AXES = {
    "seconds": ("train_seconds", "training time (s)"),
    "tokens": ("tokens", "generated tokens"),
    "steps": ("step", "optimizer steps"),
}


def _window(run: Run) -> int:
    """Steps of the running mean over a training curve: a fortieth of the run."""
    return max(1, max(arm.steps for arm in run.arms) // 40)


@dataclass(frozen=True)
class Picture:
    """A figure that was written: file, title, caption, and whether it has the full width."""

    path: Path
    title: str
    caption: str
    wide: bool


def draw_pictures(run: Run, summaries: list[ArmSummary], folder: Path) -> list[Picture]:
    """Write every figure that the run has data for into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        drawn = [
            *(_draw_metric(run, axis, folder) for axis in _AXES),
            _draw_divergence(run, folder),
            _draw_length(run, folder),
            _draw_seconds(run, summaries, folder),
            _draw_memory(run, summaries, folder),
            *(_draw_other(run, name, folder) for name in _other_metrics(run)),
        ]
    return [picture for picture in drawn if picture is not None]


def _other_metrics(run: Run) -> list[str]:
    """Names of the evaluation metrics other than the report's main one."""
    rows = [row for arm in run.arms for seed in arm.seeds for row in seed.evals]
    names = {
        name for row in rows if isinstance(row.get("metrics"), dict) for name in row["metrics"]
    }
    return sorted(names - {run.report.metric})


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


def _curve(rows: list[dict[str, Any]], x: tuple[str, ...], y: tuple[str, ...]) -> Curve:
    """Points of one seed with both coordinates known, sorted by x."""
    points = [(number(row, *x), number(row, *y)) for row in rows]
    kept = sorted(point for point in points if len(known(point)) == 2)
    xs, ys = zip(*kept, strict=True) if kept else ((), ())
    return np.array(xs, dtype=float), np.array(ys, dtype=float)


def _training_curve(key: str, window: int) -> Callable[[Seed], Curve]:
    """A quantity of metrics.jsonl by step; centred running mean, narrower at the ends."""
    half = window // 2

    def curve_of(seed: Seed) -> Curve:
        xs, ys = _curve(seed.metrics, ("step",), (key,))
        means = [ys[max(0, i - half) : i + half + 1].mean() for i in range(len(ys))]
        return xs, np.array(means)

    return curve_of


def _colour(run: Run, arm: Arm) -> tuple[str, str]:
    if arm.name == run.baseline:
        return _BASELINE_COLOUR, "-"
    style, colour = divmod(run.arms.index(arm), len(_ARM_COLOURS))
    return _ARM_COLOURS[colour], _LINE_STYLES[style % len(_LINE_STYLES)]


def _figure(width: int, height: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An Agg figure of width x height CSS pixels with a row of axes."""
    figure = Figure(figsize=(width / _CSS_DPI, height / _CSS_DPI), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=2 * _CSS_DPI, facecolor="white")
    return path


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    """Legend above the axes, in the given order, in as many columns as fit."""
    names = [shorten(name, 40) for name in handles]
    entry = 45 + 7 * max(len(name) for name in names)  # CSS pixels: line, gap, letters
    columns = max(1, int(figure.get_figwidth() * _CSS_DPI / entry))
    figure.set_figheight(figure.get_figheight() + 0.18 * ((len(names) - 1) // columns))
    figure.legend(
        list(handles.values()),
        names,
        loc="outside upper left",
        ncols=columns,
        columnspacing=1.4,
        handlelength=1.8,
    )


def _draw_arms(
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
        colour, style = _colour(run, arm)
        marker = "o" if len(grid) < 4 else None  # one point alone makes no line
        (line,) = axis.plot(grid, middle, color=colour, linestyle=style, marker=marker)
        if len(pairs) > 1:
            axis.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
        lines[arm.name] = line
        seen.extend(grid.tolist())
    return lines, seen


def _logarithmic(axis: Axes, values: list[float]) -> bool:
    """Make x logarithmic if its range is large; x = 0 is then not shown."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) / min(positive) <= _LOG_RANGE:
        return False
    axis.set_xscale("log", nonpositive="mask")
    axis.set_xlim(left=0.8 * min(positive))
    return True


def _draw_curves(run: Run, axis: Axes, metric: str, against: str) -> tuple[dict[str, Any], bool]:
    """One evaluation metric against one of _AXES."""
    x, x_label = _AXES[against]
    lines, seen = _draw_arms(run, axis, lambda seed: _curve(seed.evals, (x,), ("metrics", metric)))
    axis.set_xlim(left=0)
    logarithmic = against == "tokens" and _logarithmic(axis, seen)
    if against == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(x_label + (" (log scale)" if logarithmic else ""))
    return lines, logarithmic


def _draw_metric(run: Run, against: str, folder: Path) -> Picture | None:
    wide = against == "seconds"
    figure, (axis,) = _figure(800 if wide else 400, 400 if wide else 310)
    lines, logarithmic = _draw_curves(run, axis, run.report.metric, against)
    if not lines:
        return None
    axis.axhline(run.report.threshold, color=_QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        f"threshold\n{run.report.threshold:g}",
        (1, run.report.threshold),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=_QUIET,
    )
    axis.set_ylabel(label(run.report.metric))
    _legend(figure, lines)
    path = _save(figure, folder / f"metric_{against}.png")
    caption = f"Line: mean over seeds; band: lowest to highest seed. {_GRID_NOTE[against]}"
    if logarithmic:
        caption += " The evaluation before training, at 0 tokens, has no place on a log axis."
    title = _title(f"{label(run.report.metric)} against {_AXES[against][1]}")
    return Picture(path, title, caption, wide)


_INTERPOLATED = (
    "Each seed is interpolated linearly between its evaluations onto a common grid (every seed's "
    "evaluation points); a finished seed keeps its last value."
)
_GRID_NOTE = {
    "seconds": _INTERPOLATED + " Only timed phases count; evaluation does not.",
    "tokens": _INTERPOLATED,
    "steps": "Seeds are evaluated at the same steps, so nothing is interpolated.",
}


def _draw_divergence(run: Run, folder: Path) -> Picture | None:
    figure, (axis,) = _figure(800, 330)
    lines, _ = _draw_arms(run, axis, _training_curve("divergence", _window(run)))
    if not lines:
        return None
    values = np.concatenate([line.get_ydata() for line in lines.values()])
    if values.min() > 0 and values.max() / values.min() > _LOG_RANGE:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=min(0.0, values.min()))
    axis.set_xlim(left=0)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("divergence (nats per trained token)")
    _legend(figure, lines)
    caption = (
        "The training loss per trained token. Arms average over different positions of a "
        "response (the first N tokens against all of them), so compare shapes, not levels. "
        f"Running mean over {_window(run)} steps."
    )
    path = _save(figure, folder / "divergence.png")
    return Picture(path, "Divergence between student and teacher", caption, True)


def _draw_length(run: Run, folder: Path) -> Picture | None:
    panels = (
        ("response_length", "response length (tokens)"),
        ("eos_rate", "share that ended by EOS"),
    )
    figure, axes = _figure(800, 320, columns=2)
    handles: dict[str, Any] = {}
    for axis, (key, y_label) in zip(axes, panels, strict=True):
        lines, _ = _draw_arms(run, axis, _training_curve(key, _window(run)))
        handles |= lines
        axis.set_xlim(left=0)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(y_label)
    if not handles:
        return None
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(-0.03, 1.03)
    _legend(figure, {arm.name: handles[arm.name] for arm in run.arms if arm.name in handles})
    caption = (
        "Training rollouts; an early-stopping arm cannot be longer than its window, "
        "and what it cuts did not end by EOS. "
        f"Running mean over {_window(run)} steps."
    )
    path = _save(figure, folder / "length_eos.png")
    return Picture(path, "Response length and EOS rate in training", caption, True)


def _phase_legend(figure: Figure) -> None:
    _legend(figure, {phase: Patch(color=_PHASE_COLOURS[phase]) for phase in PHASES})


def _draw_seconds(run: Run, summaries: list[ArmSummary], folder: Path) -> Picture | None:
    rows = [item for item in summaries if not math.isnan(item.seconds_per_step)]
    if not rows:
        return None
    figure, (axis,) = _figure(800, 90 + 42 * len(rows))
    for place, item in enumerate(rows):
        left = 0.0
        for phase in PHASES:
            width = np.nan_to_num(item.step_seconds[phase])
            axis.barh(place, width, left=left, height=0.6, color=_PHASE_COLOURS[phase])
            left += width
        text = f"{item.seconds_per_step:.3g} s"
        if item.name != run.baseline and not math.isnan(item.speedup_per_step):
            text += f" ({item.speedup_per_step:.1f}x)"
        axis.annotate(text, (left, place), xytext=(5, 0), textcoords="offset points", va="center")
    _bar_axis(axis, [item.name for item in rows], "seconds per optimizer step")
    _phase_legend(figure)
    path = _save(figure, folder / "phase_seconds.png")
    caption = (
        "Mean over steps and seeds. rollout: sampling; teacher: scoring; student: forward, loss, "
        "backward and optimizer."
    )
    if run.baseline:
        caption += f" (4.0x): {run.baseline} takes four times as long."
    return Picture(path, "Seconds a step, by phase", caption, True)


def _draw_memory(run: Run, summaries: list[ArmSummary], folder: Path) -> Picture | None:
    rows = [item for item in summaries if not math.isnan(item.peak)]
    if not rows:
        return None
    scale, unit = (2**30, "GiB") if max(item.peak for item in rows) >= 2**30 else (2**20, "MiB")
    figure, (axis,) = _figure(800, 90 + 62 * len(rows))
    height = 0.27
    for place, item in enumerate(rows):
        for offset, phase in enumerate(PHASES):
            value = item.peak_bytes[phase] / scale
            if math.isnan(value):
                continue
            y = place + (offset - 1) * height
            axis.barh(y, value, height=height * 0.92, color=_PHASE_COLOURS[phase])
            axis.annotate(
                f"{value:.3g}",
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_QUIET,
            )
    _bar_axis(axis, [item.name for item in rows], f"peak memory ({unit})")
    _phase_legend(figure)
    path = _save(figure, folder / "peak_memory.png")
    caption = (
        "Highest over steps and seeds: device memory on a GPU, the whole process's resident set "
        "on a CPU (weights and libraries included)."
    )
    return Picture(path, "Peak memory, by phase", caption, True)


def _bar_axis(axis: Axes, names: list[str], x_label: str) -> None:
    axis.set_yticks(range(len(names)), [shorten(name, 24) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.2)
    axis.set_xlim(left=0)
    axis.set_xlabel(x_label)


def _draw_other(run: Run, metric: str, folder: Path) -> Picture | None:
    figure, axes = _figure(800, 260, columns=2)
    lines: dict[str, Any] = {}
    for axis, against in zip(axes, ("steps", "seconds"), strict=True):
        found, _ = _draw_curves(run, axis, metric, against)
        lines |= found
    if not lines:
        return None
    axes[0].set_ylabel(label(metric))
    _legend(figure, {arm.name: lines[arm.name] for arm in run.arms if arm.name in lines})
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", metric)
    path = _save(figure, folder / f"eval_{stem}.png")
    return Picture(path, _title(label(metric)), "Held-out problems; mean and range of seeds.", True)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]
