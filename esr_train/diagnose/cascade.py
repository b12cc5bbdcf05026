"""Cascading alignment: what training on a window does to the divergence inside it and beyond.

Each trained student is compared with the untrained one, within problems, on three texts:

own       each model on answers that it sampled itself with the same noise: same problems, other
          prefixes. What the paper plots. A change may be of the model or of what it writes.
student   both on the untrained student's answers: same prefixes.
teacher   both on the teacher's answers: same prefixes.

    change(bin) = mean over problems of  value after - value before
    relative    = mean after / mean before - 1, over the problems that have both

with exact KLs, and with the paper's |log p_student - log p_teacher| of the tokens of the text.
Training seeds are averaged within a problem, so intervals are over problems; each seed's own mean
is listed. An arm of full rollouts beside a truncated one shows what the cascade of the latter has
to be more than.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esr_train.diagnose import drawing
from esr_train.diagnose.bench import Bench, Trained
from esr_train.diagnose.drawing import plain
from esr_train.diagnose.intervals import by_position, interval, paired, position_edges, relative
from esr_train.diagnose.measure import TokenValues
from esr_train.diagnose.section import Result, Section, Shown

TEXTS = {
    "own": "each model's own answers",
    "student": "the untrained student's answers",
    "teacher": "the teacher's answers",
}
QUANTITIES = {
    "reverse_kl": "KL(student || teacher)",
    "forward_kl": "KL(teacher || student)",
    "log_ratio": "|log-ratio| of the text's token",
}


def measure(bench: Bench) -> Result:
    before = {"own": bench.on_student, "student": bench.on_student, "teacher": bench.on_teacher}
    trained = bench.trained
    longest = max(bench.edges[-1], *(int(t.answers.lengths.max()) for t in trained))
    edges = position_edges(longest, sorted({t.window for t in trained}))
    arms = []
    for name in dict.fromkeys(t.arm for t in trained):
        seeds = [t for t in trained if t.arm == name]
        arms.append(
            {
                "arm": name,
                "window": seeds[0].window,
                "steps": seeds[0].steps,
                "seeds": [t.seed for t in seeds],
                "texts": {
                    text: {
                        quantity: _compared(before[text], seeds, text, quantity, edges, bench)
                        for quantity in QUANTITIES
                    }
                    for text in TEXTS
                },
            }
        )
    return {"edges": edges, "arms": arms}


def _compared(
    before: TokenValues,
    seeds: list[Trained],
    text: str,
    quantity: str,
    edges: list[int],
    bench: Bench,
) -> Result:
    """One quantity before and after, by position and by region, for one arm."""
    first = getattr(before, quantity)
    last = [getattr(getattr(t, text), quantity) for t in seeds]
    samples, window = bench.samples, seeds[0].window
    regions = {"inside": (0, window)}
    if window < edges[-1]:
        regions |= {"next": (window, 2 * window), "beyond": (window, edges[-1])}
    binned = [by_position(x, edges, samples) for x in (first, *last)]
    old, new = binned[0], over_seeds(binned[1:])
    found: Result = {
        "before": [interval(x) for x in old.T],
        "after": [interval(x) for x in new.T],
        "change": [paired(b, a) for a, b in zip(old.T, new.T, strict=True)],
    }
    for name, (start, stop) in regions.items():
        columns = [by_position(x, [start, stop], samples)[:, 0] for x in (first, *last)]
        old_one, new_one = columns[0], over_seeds(columns[1:])
        found[name] = {
            "before": interval(np.where(np.isnan(new_one), np.nan, old_one)),
            "after": interval(np.where(np.isnan(old_one), np.nan, new_one)),
            "change": paired(new_one, old_one),
            "relative": relative(new_one, old_one),
            "by_seed": [paired(x, old_one)["mean"] for x in columns[1:]],
        }
    return found


def over_seeds(columns: list[np.ndarray]) -> np.ndarray:
    """The mean over training seeds, of the problems that every seed has."""
    found: np.ndarray = np.stack(columns).mean(0)
    return found


def show(result: Result, folder: Path) -> Shown:
    pictures = [
        _picture(result, number, quantity, folder)
        for number in range(len(result["arms"]))
        for quantity in ("reverse_kl", "log_ratio")
    ]
    tables = [(f"Change of {QUANTITIES[q]}", _table(result, q)) for q in QUANTITIES]
    return Shown(_findings(result), tables, pictures)


def _findings(result: Result) -> list[str]:
    found = []
    for arm in result["arms"]:
        where = arm["texts"]["student"]["reverse_kl"]
        parts = []
        for region, words in (("inside", "inside"), ("beyond", "beyond")):
            if region in where:
                change = where[region]["change"]
                parts.append(
                    f"{words} the first {arm['window']} tokens KL(student || teacher) changes by "
                    f"{plain(change)} nats a token ({_percent(where[region]['relative'])}), "
                    f"{drawing.verdict(change)}"
                )
        if "beyond" not in where:
            parts.append("the window is the whole answer, so nothing is beyond it")
        found.append(
            f"{arm['arm']}, on the same prefixes of the untrained student: {'; '.join(parts)}."
        )
    return found


def _percent(found: dict[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    text = f"{found['mean']:+.0%}"
    return text if found["low"] is None else f"{text}, {found['low']:+.0%} to {found['high']:+.0%}"


def _table(result: Result, quantity: str) -> list[list[str]]:
    table = [["arm, text, tokens", "problems", "before", "after", "change", "relative", "by seed"]]
    for arm in result["arms"]:
        window, longest = arm["window"], result["edges"][-1]
        places = {
            "inside": f"1-{window}",
            "next": f"{window + 1}-{2 * window}",
            "beyond": f"{window + 1}-{longest}",
        }
        for text in TEXTS:
            for region, place in places.items():
                x = arm["texts"][text][quantity].get(region)
                if x is None:
                    continue
                seeds = ", ".join("-" if m is None else f"{m:+.3f}" for m in x["by_seed"])
                table.append(
                    [
                        f"{arm['arm']}, {text}, {place}",
                        str(x["change"]["problems"]),
                        *(plain(x[key]) for key in ("before", "after", "change")),
                        _percent(x["relative"]),
                        seeds,
                    ]
                )
    return table


def _picture(result: Result, number: int, quantity: str, folder: Path) -> Any:
    arm = result["arms"][number]
    with drawing.styled():
        figure, axes = drawing.figure(350, 3)
        lines: dict[str, Any] = {}
        highest = 0.0
        for axis, (text, name) in zip(axes, TEXTS.items(), strict=True):
            middles = drawing.position_axis(axis, result["edges"], columns=3)
            found = arm["texts"][text][quantity]
            for style, key in enumerate(("before", "after")):
                at = drawing.shifted(middles, style, 2)
                line = drawing.draw_line(axis, at, found[key], style)
                if line is not None:
                    lines[f"{key} training"] = line
            axis.set_title(name, fontsize=9)
            axis.set_ylim(bottom=0)
            highest = max(highest, axis.get_ylim()[1])
            if arm["window"] < result["edges"][-1]:
                drawing.mark_position(axis, arm["window"] + 0.5, f"N = {arm['window']}")
        for axis in axes:
            axis.set_ylim(0, highest)
        axes[0].set_ylabel(f"{QUANTITIES[quantity]}\n(nats a token)")
        seeds = ", ".join(map(str, arm["seeds"]))
        problems = max(x["problems"] for x in arm["texts"]["student"][quantity]["before"])
        caption = (
            f"{arm['steps']} steps of training on the first {arm['window']} tokens, seeds {seeds}; "
            f"{problems} problems. Left: other prefixes before and after; middle and right: the "
            "same prefixes. Bars: 95 % bootstrap intervals over problems, seeds averaged; tests of "
            "a change use the pairs (table)."
        )
        texts = (f"{arm['arm']}: {QUANTITIES[quantity]} by position", caption)
        return drawing.picture(figure, lines, folder, f"cascade_{number}_{quantity}", texts)


SECTION = Section(
    name="cascade",
    title="Cascading alignment",
    question=(
        "Does training on the first N tokens lower the divergence beyond them, at the same "
        "prefixes and on each model's own text? And is that more than what an arm of full rollouts "
        "does?"
    ),
    measure=measure,
    show=show,
)
