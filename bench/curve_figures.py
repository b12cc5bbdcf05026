"""The figures and tables of `bench.curves`, from its newest records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from esr_train.report.axes import STYLE, legend, new_figure

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "curves"
_SVG = {"svg.hashsalt": "curves", "path.simplify": False}  # the same file from the same record
# By place in the record: ours first, then plain PyTorch and others. Told apart without colour by
# dashes and markers; the choice of "auto" is a ring around the plan that it took.
_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "none", "marker": "o", "markersize": 10, "mfc": "none"},
    {"color": "#0072B2", "linestyle": "-", "marker": "s"},
    {"color": "#56B4E9", "linestyle": (0, (8, 2)), "marker": "^"},
    {"color": "#222222", "linestyle": "-", "marker": "x"},
    {"color": "#D55E00", "linestyle": ":", "marker": "D"},
    {"color": "#009E73", "linestyle": "-.", "marker": "v"},
)
_STEP_LOOKS = (_LOOKS[1], _LOOKS[4])
# Key of the time's ratio and of the memory, and what each axis is called.
_LOSS = {
    "over_plain": "time over plain PyTorch's",
    "extra_mib": "MiB beyond inputs and gradients",
}
AXES: dict[str, tuple[str, dict[str, str]]] = {
    "tokens": ("tokens", _LOSS),
    "vocabulary": ("classes", _LOSS),
    "response": (
        "response tokens",
        {
            "over_full": "step over TRL's step of full length",
            "peak_mib": "peak resident MiB of the process",
        },
    ),
}


def newest(name: str, results: Path = ROOT / "bench" / "results") -> dict[str, Any] | None:
    """The newest record of one of the curves; None if there is none."""
    path = results / "curves_cpu.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [record for record in map(json.loads, lines) if record["curve"] == name]
    return found[-1] if found else None


def draw(folder: Path = FOLDER, results: Path = ROOT / "bench" / "results") -> None:
    """Write an SVG of each curve that has a record."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**STYLE, **_SVG}):
        for name in AXES:
            record = newest(name, results)
            if record is None:
                continue
            # The date of the record, and not of the drawing, tells an old figure from a new one.
            about = {"Date": None, "Title": record["problem"], "Description": record["date"]}
            _figure(name, record).savefig(folder / f"{name}.svg", metadata=about)


def _figure(name: str, record: dict[str, Any]) -> Figure:
    x_label, keys = AXES[name]
    figure, axes = new_figure(800, 340, columns=2)
    for axis, (key, y_label) in zip(axes, keys.items(), strict=True):
        lines = _draw(axis, record["table"], key, _STEP_LOOKS if name == "response" else _LOOKS)
        axis.set_xlabel(f"{x_label} (log scale)")
        # Above the axis: beside it there is room for fewer words.
        title = y_label + (", log scale" if axis.get_yscale() == "log" else "")
        axis.set_title(title, loc="left", fontsize=9.5, color="#333333")
    legend(figure, lines)
    return figure


def _draw(axis: Axes, table: dict[str, Any], key: str, looks: Any) -> dict[str, Any]:
    sizes = [int(size) for size in table]
    lines = {}
    for name, look in zip(next(iter(table.values())), looks, strict=True):
        values = [row[name][key] for row in table.values()]
        (lines[name],) = axis.plot(sizes, values, **{"markersize": 4.5, **look})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [_short(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    if key in ("extra_mib", "over_full"):  # they grow with the size
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    return lines


def _short(size: int) -> str:
    return f"{size / 1000:.0f}k" if size >= 8000 else str(size)


def block(name: str) -> str:
    """Markdown: the figure and a table, a row a size, in each cell a ratio of times and memory."""
    record = newest(name)
    if record is None:
        return f"There is no record yet: `python -m bench.curves {name}`."
    ratio, memory = AXES[name][1]
    names = list(next(iter(record["table"].values())))
    base = {"response": "TRL"}.get(name, "plain PyTorch")
    lines = [f"| {AXES[name][0]} | {base}, s | " + " | ".join(names) + " |"]
    lines += ["| ---: " * (len(names) + 2) + "|"]
    for size, row in record["table"].items():
        cells = [f"{row[who][ratio]:.2f} ({_mib(row[who][memory])})" for who in names]
        lines.append(f"| {int(size):,} | {row[base]['seconds']:.3f} | " + " | ".join(cells) + " |")
    of_one = "1 thread, processor seconds"
    threads = of_one if record["threads"] == 1 else f"{record['threads']} threads"
    note = (
        f"In each cell the {AXES[name][1][ratio]} and, in brackets, {AXES[name][1][memory]}. By "
        f"{record['problem']}; medians of up to {record['rounds']} interleaved rounds, "
        f"{record['cpu']}, {threads}, torch {record['torch']}, load before "
        f"{record['load_before']:.1f}. By `python -m bench.curves`."
    )
    figure = f"![Time and memory against {AXES[name][0]}](curves/{name}.svg)"
    return "\n".join([figure, "", *lines, "", note])


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
