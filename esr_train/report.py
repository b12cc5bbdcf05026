"""The report of a comparison: `report.html` (self-contained), `report.md`, `summary.json`, figures.

    write_report(Path("runs/demo"))         # returns runs/demo/report.html
    print(summary_table(Path("runs/demo")))

Everything is computed from the files of the run directory; no model is loaded.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esr_train.headline import between, headline, plain, ratio, target, verdicts
from esr_train.results import (
    COSTS,
    PHASES,
    Arm,
    ArmSummary,
    Row,
    Run,
    label,
    number,
    read_run,
    shorten,
    summarise,
)

if TYPE_CHECKING:
    from esr_train.figures import Picture

Table = list[list[str]]  # rows of cells, the header first

WIDTH = 100  # columns of the terminal table
_NAME_WIDTH = 18  # of an arm in the terminal table
_SAMPLES = 2  # shown of an evaluation


def write_report(run_dir: Path) -> Path:
    """Write report.html, report.md, summary.json and figures/*.png; return the path of report.html.

    Raises FileNotFoundError where `run_dir` holds no run and ValueError where its config cannot be
    used. Results that are missing are named in the report.
    """
    from esr_train.figures import draw_pictures

    run = read_run(run_dir)
    summaries = summarise(run)
    pictures = draw_pictures(run, summaries, run.path / "figures")
    for name, text in {
        "summary.json": _summary_json(run, summaries),
        "report.md": _markdown(run, summaries, pictures),
        "report.html": _html(run, summaries, pictures),
    }.items():
        (run.path / name).write_text(_printable(text), encoding="utf-8")
    return run.path / "report.html"


def summary_table(run_dir: Path) -> str:
    """The headline and the tables as plain text, at most 100 columns wide."""
    run = read_run(run_dir)
    summaries = summarise(run)
    blocks = [
        textwrap.fill(headline(run, summaries), WIDTH),
        *(
            f"{title[:WIDTH].capitalize()}\n\n{_columns(table)}"
            for title, table in _tables(run, summaries)
        ),
        textwrap.fill(_TABLE_NOTE, WIDTH),
        *(textwrap.fill(f"Note: {note}", WIDTH) for note in run.notes),
    ]
    return _printable("\n\n".join(blocks))


_TABLE_NOTE = (
    "In brackets after a cost: the cost of full rollouts divided by it, so (4.0x) means four times "
    "less. Costs to the threshold are medians over seeds, read off the first evaluation at or past "
    "it; a seed that never gets there counts as infinite. Metrics are means (lowest to highest "
    "seed). A step's seconds and tokens are means over steps and seeds, its peak memory is the "
    "highest."
)


def _level_table(summaries: list[ArmSummary]) -> Table:
    """The metric at the end and at its best, an arm a row."""
    table = [["arm", "final", "best", "seeds"]]
    for item in summaries:
        table.append([item.name, between(item.final), between(item.best), str(item.evaluated)])
    return table


def _goal_table(summaries: list[ArmSummary]) -> Table:
    """What it costs to get to the threshold, an arm a row."""
    table = [["arm", "seeds there", "seconds", "generated tokens", "steps"]]
    for item in summaries:
        row = [item.name, f"{item.reached} of {item.evaluated}"]
        for cost in COSTS:
            share = math.nan if item is summaries[-1] else item.ratios[cost].middle
            row.append(_with_ratio(plain(item.to_threshold[cost]), share))
        table.append(row)
    return table


def _with_ratio(text: str, share: float) -> str:
    return text if math.isnan(share) else f"{text} ({ratio(share)}x)"


def _step_table(summaries: list[ArmSummary]) -> Table:
    """What a step costs, an arm a row."""
    table = [["arm", *(f"{phase} s" for phase in PHASES), "all s", "tokens", "peak memory"]]
    for item in summaries:
        is_base = item is summaries[-1]
        row = [item.name, *(plain(item.step_seconds[phase]) for phase in PHASES)]
        speedup = math.nan if is_base else item.speedup_per_step
        memory = math.nan if is_base else item.memory_ratio
        row.append(_with_ratio(plain(item.seconds_per_step), speedup))
        row.append(plain(item.tokens_per_step))
        row.append(_with_ratio(size(item.peak), memory))
        table.append(row)
    return table


def _tables(run: Run, summaries: list[ArmSummary]) -> list[tuple[str, Table]]:
    return [
        (label(run.metric), _level_table(summaries)),
        (f"to {target(run)}", _goal_table(summaries)),
        ("a step", _step_table(summaries)),
    ]


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    if math.isnan(count):
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _columns(table: Table) -> str:
    """Aligned columns; long names of arms are cut."""
    cut = [[shorten(row[0], _NAME_WIDTH), *row[1:]] for row in table]
    widths = [max(len(row[i]) for row in cut) for i in range(len(cut[0]))]
    lines = []
    for row in cut:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip()[:WIDTH])
    return "\n".join(lines)


def _printable(text: str) -> str:
    """Text that any terminal, browser and UTF-8 file takes: control characters and halves of
    surrogate pairs, which a sampled response may hold, become the replacement character."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def _summary_json(run: Run, summaries: list[ArmSummary]) -> str:
    facts = {
        "headline": headline(run, summaries),
        "metric": run.metric,
        "threshold": run.threshold,
        "higher_is_better": run.higher_is_better,
        "baseline": run.baseline.name,
        "notes": run.notes,
        "arms": [dataclasses.asdict(item) for item in summaries],
    }
    return json.dumps(_strict(facts), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has neither NaN nor infinity: unknown is null, never reached is "not reached"."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "not reached"
    return value


def _title(run: Run) -> str:
    name = run.path.resolve().name
    return f"{name}: early stopping against full rollouts" if len(run.arms) > 1 else name


def _reading(run: Run) -> list[str]:
    """How to read this: what was held equal, what was measured, what it does not show."""
    arms = [
        "All arms start from the same student and see the same prompts in the same order with the "
        "same seeds, sampled by the same engine; they differ only in what the configuration's "
        f"arms list. {run.baseline.name} is the baseline, the arm with the longest rollouts.",
    ]
    text = [
        *(arms if len(run.arms) > 1 else []),
        "Training time is the sum of the timed phases (rollout, teacher, student); evaluation, "
        "loading and saving are outside of it. The cost of reaching the threshold is read off the "
        "first evaluation at or past it, without interpolation, so it is no finer than the "
        "spacing of evaluations.",
        "Peak memory on a GPU is device memory. On a CPU it is the resident high-water mark of the "
        "whole process, with weights, optimizer and libraries in it, so its ratios understate "
        "what a shorter rollout saves on activations.",
        "The bands are the lowest and the highest seed, not confidence intervals, and a few seeds "
        "say little about rare outcomes. Where arms train for different numbers of steps, their "
        "final values stand for different amounts of training.",
    ]
    if number(run.config, "eval", "problems") > 0:
        problems = run.config["eval"]["problems"]
        text.append(f"Every evaluation uses {problems} held-out problems.")
    rollout = run.config.get("rollout")
    if isinstance(rollout, dict) and rollout.get("task") == "sums":
        text.append(
            "The task is sums: a model organism, built so that the student has one good and one "
            "bad mode. It shows how the method can work; it is not evidence about LLMs."
        )
    return text


def _samples(arm: Arm) -> list[tuple[str, list[Row]]]:
    """A few samples of the first seed that has any, from its first and its last evaluation."""
    rows = next((seed.samples for seed in arm.seeds if seed.samples), [])
    steps = sorted({number(row, "step") for row in rows if not math.isnan(number(row, "step"))})
    return [
        (f"step {step:.0f}", [row for row in rows if number(row, "step") == step][:_SAMPLES])
        for step in dict.fromkeys([*steps[:1], *steps[-1:]])
    ]


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _verdict(row: Row) -> str:
    score = number(row, "score")
    return "" if math.isnan(score) else f" (score {score:g})"


def _facts(environment: Row) -> Table:
    return [[str(key), _text(environment, key) or "none"] for key in environment]


def _config_text(run: Run) -> str:
    return (run.path / "config.yaml").read_text(encoding="utf-8").rstrip()


def _markdown(run: Run, summaries: list[ArmSummary], pictures: list[Picture]) -> str:
    parts = [f"# {_title(run)}", f"**{headline(run, summaries)}**"]
    parts += [f"> {note}" for note in run.notes]
    parts.append("\n".join(f"- {text}" for text in verdicts(run, summaries)))
    for title, table in _tables(run, summaries):
        parts += [f"## {title.capitalize()}", _pipes(table)]
    parts.append(_TABLE_NOTE)
    for picture in pictures:
        link = f"![{picture.title}](figures/{picture.path.name})"
        parts += [f"## {picture.title}", link, picture.caption]
    parts.append("## Samples")
    for arm in run.arms:
        for when, rows in _samples(arm):
            for row in rows:
                parts += [f"**{arm.name}, {when}**{_verdict(row)}", _fence(_text(row, "prompt"))]
                parts.append(_fence(_text(row, "response")))
    parts += ["## How to read this", *_reading(run)]
    parts += ["## Environment", _pipes([["what", "value"], *_facts(run.environment)])]
    parts += ["## Configuration", _fence(_config_text(run), "yaml")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pipes(table: Table) -> str:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    rule = ["---"] + ["---:"] * (len(table[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [escaped[0], rule, *escaped[1:]])


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _html(run: Run, summaries: list[ArmSummary], pictures: list[Picture]) -> str:
    esc = html.escape
    title = esc(_title(run))
    notes = "".join(f"<p class=note>{esc(note)}</p>" for note in run.notes)
    bullets = "".join(f"<li>{esc(text)}</li>" for text in verdicts(run, summaries))
    body = [
        f"<h1>{title}</h1><p class=lead>{esc(headline(run, summaries))}</p>{notes}",
        f"<ul>{bullets}</ul>" if bullets else "",
        *(
            f"<h2>{esc(title.capitalize())}</h2>{_html_table(table)}"
            for title, table in _tables(run, summaries)
        ),
        f"<p class=quiet>{esc(_TABLE_NOTE)}</p>",
        "<h2>Figures</h2><div class=figures>",
        *(_html_picture(picture) for picture in pictures),
        "" if pictures else "<p>There is nothing to draw yet.</p>",
        "</div><h2>Samples</h2>",
        *(_html_samples(arm) for arm in run.arms),
        "<h2>How to read this</h2>",
        *(f"<p>{esc(text)}</p>" for text in _reading(run)),
        f"<h2>Environment</h2>{_html_table(_facts(run.environment), header=False)}",
        f"<details><summary>Configuration</summary><pre>{esc(_config_text(run))}</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style></head><body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


def _html_table(table: Table, header: bool = True) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    lines = [cells(row, "th" if header and i == 0 else "td") for i, row in enumerate(table)]
    kind = "numbers" if header else "facts"
    return f"<div class=scroll><table class={kind}>{''.join(lines)}</table></div>"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    return (
        f"<figure{' class=wide' if picture.wide else ''}><figcaption><b>{title}</b></figcaption>"
        f'<img alt="{title}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _html_samples(arm: Arm) -> str:
    name, chosen = html.escape(arm.name), _samples(arm)
    if not chosen:
        return f"<p class=quiet>{name}: none.</p>"
    parts = []
    for when, rows in chosen:
        for row in rows:
            prompt, response = (html.escape(_text(row, key)) for key in ("prompt", "response"))
            parts.append(
                f"<p class=quiet>{when}{_verdict(row)}</p>"
                f"<pre><span class=prompt>{prompt}</span>\n{response}</pre>"
            )
    return f"<details><summary>{name}</summary>{''.join(parts)}</details>"


_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #656d76; --line: #d8dee4;
        --paper: #fff; --soft: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --quiet: #9198a1; --line: #30363d; --paper: #0d1117; --soft: #161b22; }
}
* { box-sizing: border-box; }
body { max-width: 832px; margin: 0 auto; padding: 24px 16px 64px; background: var(--paper);
       color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.3; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
.lead { font-size: 1.12rem; } .quiet, figcaption, .prompt { color: var(--quiet); }
.quiet, figcaption { font-size: .86rem; } figcaption b { color: var(--ink); }
.note { background: var(--soft); border-left: 3px solid #d4a72c; padding: .4em .8em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .8em .35em 0; border-bottom: 1px solid var(--line); text-align: left;
         vertical-align: top; }
.numbers th, .numbers td { white-space: nowrap; }
.numbers :is(th, td):not(:first-child) { text-align: right; padding: .35em .7em; }
th, .facts td:first-child { white-space: nowrap; color: var(--quiet); font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 28px 0; justify-content: space-between; }
figure { margin: 0; width: calc(50% - 8px); } figure.wide { width: 100%; }
@media (max-width: 640px) {
  figure { width: 100%; } ul { padding-left: 1.2em; }
  table { font-size: .8rem; } .numbers :is(th, td):not(:first-child) { padding: .35em .45em; }
}
img { display: block; width: 100%; height: auto; margin: 6px 0; border-radius: 6px; }
pre { background: var(--soft); padding: .8em; border-radius: 6px; font-size: .82rem;
      line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5em 0; } summary { cursor: pointer; }
"""
