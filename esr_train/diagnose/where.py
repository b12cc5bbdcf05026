"""Where the divergence is: by position, by its share in the first tokens, and at the stops.

All on answers that the untrained student sampled, at temperature 1:

    value(bin) = mean over problems of the mean of a problem's tokens in the bin
    share(n)   = mean over answers of  sum of KL(student || teacher) over its first n tokens
                                      / sum over all of its tokens

A stop is the last token of an answer that ended by itself. What it costs is log p_student -
log p_teacher of the token that ended it; a student whose terminator the teacher does not use pays
for every stop. Merged, the probability of all ways to stop is one class on both sides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from esr_train.diagnose import drawing
from esr_train.diagnose.bench import Bench, windows
from esr_train.diagnose.drawing import plain
from esr_train.diagnose.intervals import (
    by_position,
    by_problem,
    interval,
    position_edges,
    share,
)
from esr_train.diagnose.measure import TokenValues
from esr_train.diagnose.section import Result, Section, Shown
from esr_train.rollout import RolloutBatch

# Attributes of TokenValues, and what they are called.
QUANTITIES = {
    "reverse_kl": "KL(student || teacher)",
    "forward_kl": "KL(teacher || student)",
    "log_ratio": "|log-ratio| of the sampled token",
    "student_entropy": "entropy of the student",
    "teacher_entropy": "entropy of the teacher",
    "agreement": "same most probable token",
}


def measure(bench: Bench) -> Result:
    values, texts = bench.on_student, bench.student_answers
    ends = bench.experiment.stops
    result: Result = {
        "edges": bench.edges,
        "answers": len(texts.prompts),
        "by_position": {
            name: [
                interval(column)
                for column in by_position(getattr(values, name), bench.edges, bench.samples).T
            ]
            for name in QUANTITIES
        },
        "first": [
            {"n": n, **shares_of_first(values.reverse_kl, n, bench.samples)}
            for n in position_edges(bench.edges[-1], [*windows(bench.config), 100])[1:]
        ],
        "terminators": [list(group) for group in ends],
        "stops": {"apart": of_stops(values, texts, bench.samples)},
        "teacher_stops": {
            "apart": of_stops(bench.on_teacher, bench.teacher_answers, bench.samples)
        },
    }
    if all(ends) and max(map(len, ends)) > 1:  # else there is nothing to merge
        merged = bench.merged
        result["stops"]["merged"] = of_stops(merged[0], texts, bench.samples)
        result["teacher_stops"]["merged"] = of_stops(
            merged[1], bench.teacher_answers, bench.samples
        )
    return result


def shares_of_first(kl: np.ndarray, n: int, samples: int) -> Result:
    """Share of an answer's divergence, and of its tokens, that its first n tokens have.

    An answer without any divergence has no such share.
    """
    known = ~np.isnan(kl)
    total, tokens = np.nansum(kl, axis=1), known.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_kl = np.where(total > 0, np.nansum(kl[:, :n], axis=1) / total, np.nan)
    of_tokens = known[:, :n].sum(1) / tokens
    return {
        "share": interval(by_problem(of_kl, samples)),
        "share_of_tokens": interval(by_problem(of_tokens, samples)),
    }


def of_stops(values: TokenValues, texts: RolloutBatch, samples: int) -> Result:
    """What is measured at the last tokens of answers that ended by themselves."""
    ended = texts.finished_by_eos.numpy()
    last = np.zeros(texts.tokens.shape, dtype=bool)
    last[np.arange(len(ended)), texts.lengths.numpy() - 1] = ended

    def at_stops(array: np.ndarray) -> np.ndarray:
        found = np.full(len(array), np.nan)
        found[ended] = array[last]
        return by_problem(found, samples)

    total = np.nansum(values.reverse_kl, axis=1)
    kl_at_stop = np.where(last, np.nan_to_num(values.reverse_kl), 0.0).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_answer = np.where(ended & (total > 0), kl_at_stop / total, np.nan)
    return {
        "stopped": share(by_problem(ended.astype(float), samples)),
        "count": int(ended.sum()),
        "cost": interval(at_stops(values.student_logprob - values.teacher_logprob)),
        "student_logprob": interval(at_stops(values.student_logprob)),
        "teacher_logprob": interval(at_stops(values.teacher_logprob)),
        "reverse_kl": interval(at_stops(values.reverse_kl)),
        "forward_kl": interval(at_stops(values.forward_kl)),
        "share_of_answer": interval(by_problem(of_answer, samples)),
    }


def show(result: Result, folder: Path) -> Shown:
    return Shown(
        _findings(result),
        [("Share of an answer's divergence", _shares(result)), ("Stops", _stops(result))],
        [_by_position(result, folder), _first(result, folder)],
    )


def _findings(result: Result) -> list[str]:
    kl, edges = result["by_position"]["reverse_kl"], result["edges"]
    known = [i for i, found in enumerate(kl) if found["mean"] is not None]
    most = max(known, key=lambda i: kl[i]["mean"])
    place = f"{edges[most] + 1}" + (
        f" to {edges[most + 1]}" if edges[most + 1] > edges[most] + 1 else ""
    )
    found = [
        f"KL(student || teacher) is largest at token {place}: {plain(kl[most])} nats a token; at "
        f"the end of the longest answers it is {plain(kl[known[-1]])}."
    ]
    for row in result["first"]:
        if row["share"]["mean"] is not None and row["share"]["mean"] >= 0.5:
            found.append(
                f"The first {row['n']} tokens have {plain(row['share'], 2)} of an answer's "
                f"divergence and {plain(row['share_of_tokens'], 2)} of its tokens."
            )
            break
    stops = result["stops"]
    cost = stops["apart"]["cost"]
    if cost["mean"] is None:
        return [*found, "No answer of the student ended by itself."]
    text = f"A stop of the student costs {plain(cost, 2)} nats of log-ratio"
    if "merged" in stops:
        text += f", and {plain(stops['merged']['cost'], 2)} with all terminators as one class"
    share_of = stops["apart"]["share_of_answer"]
    return [*found, f"{text}; it has {plain(share_of, 3)} of its answer's divergence."]


def _shares(result: Result) -> list[list[str]]:
    table = [["first n tokens", "share of the divergence", "share of the tokens"]]
    return table + [
        [str(row["n"]), plain(row["share"]), plain(row["share_of_tokens"])]
        for row in result["first"]
    ]


def _stops(result: Result) -> list[list[str]]:
    table = [
        ["stops of", "terminators", "count", "cost (nats)", "log p student", "log p teacher", "KL"]
    ]
    for who, key in (("the student", "stops"), ("the teacher", "teacher_stops")):
        for how, x in result[key].items():
            parts = (plain(x[k], 2) for k in ("cost", "student_logprob", "teacher_logprob"))
            table.append([who, how, str(x["count"]), *parts, plain(x["reverse_kl"])])
    return table


def _by_position(result: Result, folder: Path) -> Any:
    groups = (
        ("nats a token", ("reverse_kl", "forward_kl", "log_ratio")),
        ("entropy (nats)", ("student_entropy", "teacher_entropy")),
        ("share of tokens that agree", ("agreement",)),
    )
    with drawing.styled():
        figure, axes = drawing.figure(360, 3)
        lines: dict[str, Any] = {}
        for axis, (label, names) in zip(axes, groups, strict=True):
            middles = drawing.position_axis(axis, result["edges"], columns=3)
            for number, name in enumerate(names):
                at = drawing.shifted(middles, number, len(names))
                style = list(QUANTITIES).index(name)
                line = drawing.draw_line(axis, at, result["by_position"][name], style)
                if line is not None:
                    lines[QUANTITIES[name]] = line
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
        axes[2].set_ylim(0, 1.03)
        problems = max(x["problems"] for x in result["by_position"]["reverse_kl"])
        caption = (
            f"{result['answers']} answers of the untrained student to {problems} problems; a bin "
            "has the answers that reach it. Bars: 95 % bootstrap intervals over problems."
        )
        texts = ("Divergence, entropy and agreement by position", caption)
        return drawing.picture(figure, lines, folder, "where_by_position", texts)


def _first(result: Result, folder: Path) -> Any:
    with drawing.styled():
        figure, (axis,) = drawing.figure(330)
        drawing.position_axis(axis, result["edges"])
        ns = [float(row["n"]) for row in result["first"]]
        names = {"share": "share of the divergence", "share_of_tokens": "share of the tokens"}
        lines = {
            name: drawing.draw_line(axis, ns, [row[key] for row in result["first"]], number)
            for number, (key, name) in enumerate(names.items())
        }
        axis.set_xlabel("first n tokens of an answer (log scale)")
        axis.set_ylabel("share of the whole answer")
        axis.set_ylim(-0.03, 1.03)
        caption = (
            "Mean over problems of the share that the first n tokens of an answer have of its "
            "summed KL(student || teacher), and of its tokens, which is what divergence spread "
            "evenly would have. Bars: 95 % bootstrap intervals over problems."
        )
        known = {name: line for name, line in lines.items() if line is not None}
        texts = ("Share of an answer's divergence in its first n tokens", caption)
        return drawing.picture(figure, known, folder, "where_first", texts)


SECTION = Section(
    name="where",
    title="Where the divergence is",
    question=(
        "At which positions do student and teacher differ on the student's own answers, how much "
        "of an answer's divergence do its first tokens have, and what does a stop cost?"
    ),
    measure=measure,
    show=show,
)
