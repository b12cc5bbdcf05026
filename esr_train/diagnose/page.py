"""The report of a diagnosis: report.html, self-contained, and report.md with figures/*.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from esr_train.diagnose.section import Result, Section, Shown
from esr_train.report.page import printable, templates

_READING = [
    "Every number is over held-out problems. A problem's samples and tokens are averaged first; "
    "intervals are 95 % percentile bootstraps over problems, over pairs where two conditions are "
    "compared. They do not cover another training seed, and several intervals are shown at once: "
    "some exclude a true value by chance.",
    "Divergences and entropies are exact, over the whole vocabulary, at temperature 1, in nats. "
    "Texts are sampled at the temperature and with the filters of the configuration's rollouts.",
    "An interval of fewer than 5 problems is not given.",
]
_ORGANISM = (
    "The task is sums: a model organism, built so that the student has one good and one bad mode. "
    "It shows what the diagnostics do; it is not evidence about LLMs."
)


def write_page(out: Path, sections: tuple[Section, ...], results: dict[str, Result]) -> Path:
    """Write figures and both forms of the report; sections without a result are named."""
    shown = [_shown(section, results.get(section.name), out / "figures") for section in sections]
    configuration = (out / "config.yaml").read_text(encoding="utf-8").rstrip()
    task = yaml.safe_load(configuration)["data"]["task"]
    environment: dict[str, Any] = json.loads((out / "environment.json").read_text("utf-8"))
    content = {
        "title": f"{out.resolve().name}: diagnosis",
        "sections": shown,
        "reading": [*([_ORGANISM] if task == "sums" else []), *_READING],
        "environment": [[key, str(value)] for key, value in environment.items()],
        "configuration": configuration,
    }
    made = templates(Path(__file__).parent)
    for name, template in (("report.md", "diagnosis.md.j2"), ("report.html", "diagnosis.html.j2")):
        text = printable(made.get_template(template).render(content))
        (out / name).write_text(text, encoding="utf-8")
    return out / "report.html"


def _shown(section: Section, result: Result | None, folder: Path) -> dict[str, Any]:
    shown, facts = Shown(["Not measured yet."]), ""
    if result is not None:
        shown, found = section.show(result, folder), result["facts"]
        seeds = "training seeds " + ", ".join(map(str, found["training_seeds"]))
        facts = (
            f"{found['problems']} problems, sampled answers to each: {found['samples']}, at "
            f"temperature {found['temperature']:g}; {seeds}; {found['seconds']:.0f} s."
        )
    return {
        "name": section.name,
        "title": section.title,
        "question": section.question,
        "facts": facts,
        "findings": shown.findings,
        "tables": shown.tables,
        "pictures": shown.pictures,
    }
