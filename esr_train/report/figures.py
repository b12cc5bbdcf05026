"""The figures of a report: PNG files of a run's curves and costs, drawn by matplotlib's Agg.

Each figure is a function that returns a `Picture`, or None if the run has no data for it. The page
shows all that `draw_pictures` returns. `axes` has what the figures share.
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

from esr_train.report.axes import (
    LOG_RANGE,
    PHASE_COLOURS,
    QUIET,
    STYLE,
    Curve,
    bar_axis,
    curve,
    draw_arms,
    legend,
    make_logarithmic,
    new_figure,
    save,
)
from esr_train.report.results import Run, Seed, label
from esr_train.report.summary import PHASES, ArmSummary

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
    with matplotlib.rc_context(STYLE):
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


def _training_curve(key: str, window: int) -> Callable[[Seed], Curve]:
    """A quantity of metrics.jsonl by step; centred running mean, narrower at the ends."""
    half = window // 2

    def curve_of(seed: Seed) -> Curve:
        xs, ys = curve(seed.metrics, ("step",), (key,))
        means = [ys[max(0, i - half) : i + half + 1].mean() for i in range(len(ys))]
        return xs, np.array(means)

    return curve_of


def _draw_curves(run: Run, axis: Axes, metric: str, against: str) -> tuple[dict[str, Any], bool]:
    """One evaluation metric against one of _AXES."""
    x, x_label = _AXES[against]
    lines, seen = draw_arms(run, axis, lambda seed: curve(seed.evals, (x,), ("metrics", metric)))
    axis.set_xlim(left=0)
    logarithmic = against == "tokens" and make_logarithmic(axis, seen)
    if against == "tokens":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_xlabel(x_label + (" (log scale)" if logarithmic else ""))
    return lines, logarithmic


def _draw_metric(run: Run, against: str, folder: Path) -> Picture | None:
    wide = against == "seconds"
    figure, (axis,) = new_figure(800 if wide else 400, 400 if wide else 310)
    lines, logarithmic = _draw_curves(run, axis, run.report.metric, against)
    if not lines:
        return None
    axis.axhline(run.report.threshold, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        f"threshold\n{run.report.threshold:g}",
        (1, run.report.threshold),
        xycoords=("axes fraction", "data"),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=QUIET,
    )
    axis.set_ylabel(label(run.report.metric))
    legend(figure, lines)
    path = save(figure, folder / f"metric_{against}.png")
    seeds = max(len(arm.seeds) for arm in run.arms)
    caption = f"Line: mean over {seeds} seed{'s' * (seeds > 1)}; "
    caption += f"band: lowest to highest. {_GRID_NOTE[against]}"
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
    figure, (axis,) = new_figure(800, 330)
    lines, _ = draw_arms(run, axis, _training_curve("divergence", _window(run)))
    if not lines:
        return None
    values = np.concatenate([line.get_ydata() for line in lines.values()])
    if values.min() > 0 and values.max() / values.min() > LOG_RANGE:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(bottom=min(0.0, values.min()))
    axis.set_xlim(left=0)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("divergence (nats per trained token)")
    legend(figure, lines)
    caption = (
        "The training loss per trained token. Arms average over different positions of a "
        "response (the first N tokens against all of them), so compare shapes, not levels. "
        f"Running mean over {_window(run)} steps."
    )
    path = save(figure, folder / "divergence.png")
    return Picture(path, "Divergence between student and teacher", caption, True)


def _draw_length(run: Run, folder: Path) -> Picture | None:
    panels = (
        ("response_length", "response length (tokens)"),
        ("eos_rate", "share that ended by EOS"),
    )
    figure, axes = new_figure(800, 320, columns=2)
    handles: dict[str, Any] = {}
    for axis, (key, y_label) in zip(axes, panels, strict=True):
        lines, _ = draw_arms(run, axis, _training_curve(key, _window(run)))
        handles |= lines
        axis.set_xlim(left=0)
        axis.set_xlabel("optimizer steps")
        axis.set_ylabel(y_label)
    if not handles:
        return None
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(-0.03, 1.03)
    legend(figure, {arm.name: handles[arm.name] for arm in run.arms if arm.name in handles})
    caption = (
        "Training rollouts; an early-stopping arm cannot be longer than its window, "
        "and what it cuts did not end by EOS. "
        f"Running mean over {_window(run)} steps."
    )
    path = save(figure, folder / "length_eos.png")
    return Picture(path, "Response length and EOS rate in training", caption, True)


def _phase_legend(figure: Figure) -> None:
    legend(figure, {phase: Patch(color=PHASE_COLOURS[phase]) for phase in PHASES})


def _draw_seconds(run: Run, summaries: list[ArmSummary], folder: Path) -> Picture | None:
    rows = [item for item in summaries if not math.isnan(item.seconds_per_step)]
    if not rows:
        return None
    figure, (axis,) = new_figure(800, 90 + 42 * len(rows))
    for place, item in enumerate(rows):
        left = 0.0
        for phase in PHASES:
            width = np.nan_to_num(item.step_seconds[phase])
            axis.barh(place, width, left=left, height=0.6, color=PHASE_COLOURS[phase])
            left += width
        text = f"{item.seconds_per_step:.3g} s"
        if item.name != run.baseline and not math.isnan(item.speedup_per_step):
            text += f" ({item.speedup_per_step:.1f}x)"
        axis.annotate(text, (left, place), xytext=(5, 0), textcoords="offset points", va="center")
    bar_axis(axis, [item.name for item in rows], "seconds per optimizer step")
    _phase_legend(figure)
    path = save(figure, folder / "phase_seconds.png")
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
    figure, (axis,) = new_figure(800, 90 + 62 * len(rows))
    height = 0.27
    for place, item in enumerate(rows):
        for offset, phase in enumerate(PHASES):
            value = item.peak_bytes[phase] / scale
            if math.isnan(value):
                continue
            y = place + (offset - 1) * height
            axis.barh(y, value, height=height * 0.92, color=PHASE_COLOURS[phase])
            axis.annotate(
                f"{value:.3g}",
                (value, y),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=QUIET,
            )
    bar_axis(axis, [item.name for item in rows], f"peak memory ({unit})")
    _phase_legend(figure)
    path = save(figure, folder / "peak_memory.png")
    caption = (
        "Highest over steps and seeds: device memory on a GPU, the whole process's resident set "
        "on a CPU (weights and libraries included)."
    )
    return Picture(path, "Peak memory, by phase", caption, True)


def _draw_other(run: Run, metric: str, folder: Path) -> Picture | None:
    figure, axes = new_figure(800, 260, columns=2)
    lines: dict[str, Any] = {}
    for axis, against in zip(axes, ("steps", "seconds"), strict=True):
        found, _ = _draw_curves(run, axis, metric, against)
        lines |= found
    if not lines:
        return None
    axes[0].set_ylabel(label(metric))
    legend(figure, {arm.name: lines[arm.name] for arm in run.arms if arm.name in lines})
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", metric)
    path = save(figure, folder / f"eval_{stem}.png")
    return Picture(path, _title(label(metric)), "Held-out problems; mean and range of seeds.", True)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]
