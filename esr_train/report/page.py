"""The report of a comparison: `report.html` (self-contained), `report.md`, `summary.json`, figures.

    write_report(Path("runs/demo"))         # returns runs/demo/report.html
    print(summary_table(Path("runs/demo")))

Everything is computed from the files of the run directory; no model is loaded. The templates
`page.html.j2` and `report.md.j2` lay out the same content.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from esr_train.alarms import MEANING
from esr_train.config import EVAL_PROBLEMS
from esr_train.report.headline import headline, verdicts
from esr_train.report.results import Arm, Row, Run, number, read_run
from esr_train.report.summary import ArmSummary, summarise
from esr_train.report.tables import WIDTH, as_columns, as_markdown, table_note, tables
from esr_train.report.tuning import not_tuned, read_tuning

_SAMPLES = 2  # shown of an evaluation


def write_report(run_dir: Path) -> Path:
    """Write report.html, report.md, summary.json and figures/*.png; return the path of report.html.

    Raises FileNotFoundError where `run_dir` holds no run and ConfigError where its config cannot
    be used. Results that are missing are named in the report.
    """
    # Importing matplotlib takes a second, and its first import writes a cache of fonts.
    from esr_train.report.figures import draw_pictures

    run = read_run(run_dir)
    summaries = summarise(run)
    made = templates()
    content = _content(run, summaries)
    content["pictures"] = draw_pictures(run, summaries, run.path / "figures")
    for name, text in {
        "summary.json": _summary_json(run, summaries),
        "report.md": made.get_template("report.md.j2").render(content),
        "report.html": made.get_template("page.html.j2").render(content),
    }.items():
        (run.path / name).write_text(printable(text), encoding="utf-8")
    return run.path / "report.html"


def summary_table(run_dir: Path) -> str:
    """The headline and the tables as plain text, at most 100 columns wide."""
    run = read_run(run_dir)
    content = _content(run, summarise(run))
    blocks = [
        textwrap.fill(content["headline"], WIDTH),
        *(f"{title[:WIDTH]}\n\n{as_columns(table)}" for title, table in content["tables"]),
        textwrap.fill(content["table_note"], WIDTH),
        *(textwrap.fill(f"Note: {note}", WIDTH) for note in content["notes"]),
    ]
    return printable("\n\n".join(blocks))


def templates(*folders: Path) -> Environment:
    """The templates of this package and of `folders`, and the filters that they use."""
    made = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"pipes": as_markdown, "fence": _fence, "base64": _base64}
    return made


def _content(run: Run, summaries: list[ArmSummary]) -> dict[str, Any]:
    """The content of a report without its figures, in the order of the page."""
    return {
        "title": _title(run),
        "headline": headline(run, summaries),
        "notes": _notes(run),
        "verdicts": verdicts(run, summaries),
        "tables": tables(run, summaries),
        "table_note": table_note(run),
        "alarms": _alarms(run),
        "samples": [(arm.name, _samples(arm)) for arm in run.arms],
        "reading": _reading(run),
        "environment": [[key, _text(run.environment[key]) or "none"] for key in run.environment],
        "configuration": (run.path / "config.yaml").read_text(encoding="utf-8").rstrip(),
    }


def _title(run: Run) -> str:
    name = run.path.resolve().name
    others = ", ".join(arm.name for arm in run.arms if arm.name != run.baseline)
    return f"{name}: {others} against {run.baseline}" if run.baseline else name


def _notes(run: Run) -> list[str]:
    """What is missing, and what is to be said of the rates that were chosen."""
    arms = (read_tuning(run.path) or {"arms": {}})["arms"]
    return run.notes + [
        f"{name}: the chosen learning rate, {arm['chosen']:g}: {arm['note']}."
        for name, arm in arms.items()
        if arm["note"]
    ]


def _reading(run: Run) -> list[str]:
    """How to read this: what was held equal, what was measured, what it does not show."""
    text = []
    if len(run.arms) > 1:
        text.append(
            "All arms start from the same student and see the same prompts in the same order with "
            "the same seeds, sampled by the same engine; they differ only in what the "
            "configuration's arms list. "
            + (
                f"{run.baseline} is the baseline, the arm that ratios refer to."
                if run.baseline
                else "report.baseline names no arm, so there are no ratios between arms."
            )
        )
    text += [
        "Training time is the sum of the timed phases (rollout, teacher, student); evaluation, "
        "loading and saving are outside of it. The cost of reaching the threshold is interpolated "
        "between two evaluations, as if the metric rose evenly between them: what is certain is "
        "the bracket, no finer than the spacing of evaluations.",
        "Peak memory on a GPU is device memory. On a CPU it is the resident high-water mark of the "
        "whole process, with weights, optimizer and libraries in it, so its ratios understate "
        "what a shorter rollout saves on activations.",
        "The bands are the lowest and the highest seed, not confidence intervals, and a few seeds "
        "say little about rare outcomes. Where arms train for different numbers of steps, their "
        "final values stand for different amounts of training.",
    ]
    if run.config.eval.every:
        count = run.config.eval.problems or f"all, but at most {EVAL_PROBLEMS},"
        text.append(f"Every evaluation uses {count} held-out problems.")
    if run.config.data.task == "sums":
        text.append(
            "The task is sums: a model organism, built so that the student has one good and one "
            "bad mode. It shows how the method can work; it is not evidence about LLMs."
        )
    return text


def _alarms(run: Run) -> list[str]:
    """What was raised: where first, how often, what it means."""
    steps: dict[tuple[str, str], list[int]] = {}
    for arm in run.arms:
        for seed in arm.seeds:
            for row in sorted([*seed.metrics, *seed.evals], key=lambda row: row["step"]):
                for name in row.get("alarms") or []:
                    where = f"{arm.name} seed {seed.number}"
                    steps.setdefault((name, where), []).append(int(row["step"]))
    return [
        f"{name}, {where}: first at step {found[0]}, {len(found)} in all. "
        f"{MEANING.get(name, 'Unknown to this version.')}."
        for (name, where), found in steps.items()
    ]


def _samples(arm: Arm) -> list[Row]:
    """A few samples of the first seed that has any, from its first and its last evaluation."""
    rows = next((seed.samples for seed in arm.seeds if seed.samples), [])
    steps = sorted({number(row, "step") for row in rows if not math.isnan(number(row, "step"))})
    chosen = [
        row
        for step in dict.fromkeys([*steps[:1], *steps[-1:]])
        for row in [row for row in rows if number(row, "step") == step][:_SAMPLES]
    ]
    return [
        {
            "step": f"{number(row, 'step'):.0f}",
            "score": _score(row),
            "prompt": _text(row.get("prompt")),
            "response": _text(row.get("response")),
        }
        for row in chosen
    ]


def _score(row: Row) -> str:
    score = number(row, "score")
    return "" if math.isnan(score) else f" (score {score:g})"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _fence(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def printable(text: str) -> str:
    """Text that terminals, browsers and UTF-8 files accept: control characters and halves of
    surrogate pairs, which a sampled response may have, become the replacement character."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def _summary_json(run: Run, summaries: list[ArmSummary]) -> str:
    facts = {
        "headline": headline(run, summaries),
        "metric": run.report.metric,
        "threshold": run.report.threshold,
        "higher_is_better": run.report.higher_is_better,
        "baseline": run.baseline,
        "notes": _notes(run),
        "not_tuned": not_tuned(run),
        "arms": [dataclasses.asdict(item) for item in summaries],
    }
    return json.dumps(_strict(facts), indent=2, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    """JSON has neither NaN nor infinity: unknown is null, never reached is "not reached"."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "not reached"
    return value
