"""Sub-mode commitment: which of its ways to answer a model chooses, and when.

For the teacher, the untrained student and every trained one, on their own sampled answers:

openings    clusters of answers with the same first OPENING tokens: shares, number, entropy, and the
            probability that answers to two different problems open alike
habits      shares of what the task's own `habit(response)` says, where it has one
first token its rank under the teacher
forks       of students, at the tenth of tokens with the largest KL(student || teacher): the rank
            under the teacher of the student's most probable token
lengths     deciles, and the share of answers that ended by themselves

The entropy of openings, -sum share log share, is lower in a sample than in the distribution. The
probability of opening alike is over pairs of problems, which makes it unbiased.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esr_train.diagnose import drawing
from esr_train.diagnose.bench import Bench
from esr_train.diagnose.drawing import plain
from esr_train.diagnose.intervals import by_problem, interval, share
from esr_train.diagnose.measure import TokenValues
from esr_train.diagnose.section import Result, Section, Shown
from esr_train.report.axes import bar_axis
from esr_train.rollout import RolloutBatch

OPENING = 4  # tokens
_SHOWN = 6  # openings of each writer
_FORKS = 0.1  # share of an answer's tokens that count as forks
_RANKS = {"1": (1, 1), "2 to 5": (2, 5), "above 5": (6, None)}


def measure(bench: Bench) -> Result:
    students = [("student", bench.student_answers, bench.on_student)]
    students += [(f"{t.arm}, seed {t.seed}", t.answers, t.own) for t in bench.trained]
    teacher = _writer(bench, bench.teacher_answers, bench.on_teacher)
    writers = {"teacher": teacher} | {name: _writer(bench, texts, x) for name, texts, x in students}
    for name, _, values in students:
        ranks = np.where(forks(values.reverse_kl), values.top_rank, np.nan)
        writers[name]["fork_rank"] = _ranks(ranks, bench.samples)
    return {
        "opening_tokens": OPENING,
        "limit": bench.limit,
        "writers": writers,
    }


def _writer(bench: Bench, answers: RolloutBatch, values: TokenValues) -> Result:
    samples, count = bench.samples, len(answers.prompts)
    tokens = [answers.response(row) for row in range(count)]
    found: Result = {"answers": count}
    found |= openings([tuple(ids[:OPENING]) for ids in tokens], samples)
    for opening in found["openings"]:
        opening["text"] = bench.text(opening.pop("tokens"))
    habit = getattr(bench.task, "habit", None)
    if habit is not None:
        named = [habit(bench.text(ids)) for ids in tokens]
        found["habits"] = {
            name: share(by_problem(np.array([float(x == name) for x in named]), samples))
            for name in sorted(set(named))
        }
    found["first_token_rank"] = _ranks(values.token_rank[:, :1], samples)
    lengths = answers.lengths.numpy().astype(float)
    found["length"] = interval(by_problem(lengths, samples))
    found["length_deciles"] = np.percentile(lengths, np.arange(0, 101, 10)).tolist()
    found["stopped"] = share(by_problem(answers.finished_by_eos.numpy().astype(float), samples))
    return found


def openings(begins: Sequence[tuple[int, ...]], samples: int) -> Result:
    """Clusters of equal beginnings of [problems * samples] answers."""
    counts, total = Counter(begins), len(begins)
    shares = np.array(list(counts.values())) / total
    most = counts.most_common()
    problem = np.arange(total) // samples
    of_other = total * total - sum(int((problem == p).sum()) ** 2 for p in set(problem.tolist()))
    within = Counter(zip(problem.tolist(), begins, strict=True))
    alike = sum(n * n for n in counts.values()) - sum(n * n for n in within.values())
    is_top = np.array([float(begin == most[0][0]) for begin in begins])
    return {
        "distinct": len(counts),
        "entropy": float(-(shares * np.log(shares)).sum()) + 0.0,
        "alike": alike / of_other if of_other else None,
        "top": share(by_problem(is_top, samples)),
        "openings": [
            {"tokens": list(begin), "share": number / total} for begin, number in most[:_SHOWN]
        ],
    }


def forks(kl: np.ndarray) -> np.ndarray:
    """[B, N] bool: the tenth of each answer's tokens, at least one, with the largest divergence."""
    chosen = np.zeros(kl.shape, dtype=bool)
    for row, values in enumerate(kl):
        tokens = int((~np.isnan(values)).sum())
        order = np.argsort(-np.nan_to_num(values[:tokens]), kind="stable")
        chosen[row, order[: max(1, round(_FORKS * tokens))]] = True
    return chosen


def _ranks(ranks: np.ndarray, samples: int) -> Result:
    """Shares of ranks [B, N], NaN where there is none, in the classes of _RANKS."""
    found = {}
    for name, (low, high) in _RANKS.items():
        inside = (ranks >= low) & (ranks <= (high or np.inf))
        each = np.where(np.isnan(ranks), np.nan, inside.astype(float))
        with np.errstate(invalid="ignore"):
            of_answer = np.nansum(each, axis=1) / (~np.isnan(each)).sum(1)
        found[name] = share(by_problem(of_answer, samples))
    return found


def show(result: Result, folder: Path) -> Shown:
    writers = result["writers"]
    n = result["opening_tokens"]
    table = [["writer", "distinct", "entropy", "alike", "the most frequent", "its share"]]
    for name, x in writers.items():
        alike = "-" if x["alike"] is None else f"{x['alike']:.2f}"
        top = repr(x["openings"][0]["text"])
        table.append(
            [name, str(x["distinct"]), f"{x['entropy']:.2f}", alike, top, plain(x["top"], 2)]
        )
    tables = [(f"Openings: the first {n} tokens", table)]
    if all("habits" in x for x in writers.values()):
        names = sorted({habit for x in writers.values() for habit in x["habits"]})
        rows = [
            [name, *(plain(x["habits"][h], 2) if h in x["habits"] else "0" for h in names)]
            for name, x in writers.items()
        ]
        tables.append(("Habits that the task knows", [["writer", *names], *rows]))
    for key, title in (
        ("first_token_rank", "Rank under the teacher of the first token that was sampled"),
        ("fork_rank", "Rank under the teacher of the student's most probable token, at its forks"),
    ):
        rows = [
            [name, *(plain(f, 2) for f in x[key].values())]
            for name, x in writers.items()
            if key in x
        ]
        tables.append((title, [["writer", *_RANKS], *rows]))
    lengths = [["writer", "10 %", "50 %", "90 %", "mean", "ended by itself"]]
    for name, x in writers.items():
        deciles = (f"{x['length_deciles'][i]:.0f}" for i in (1, 5, 9))
        lengths.append([name, *deciles, plain(x["length"], 1), plain(x["stopped"], 2)])
    tables.append(("Lengths (tokens)", lengths))
    return Shown(_findings(result), tables, [_openings(result, folder), _lengths(result, folder)])


def _findings(result: Result) -> list[str]:
    writers = result["writers"]
    found = []
    for name, x in writers.items():
        alike = "" if x["alike"] is None else f"; two problems open alike with {x['alike']:.2f}"
        found.append(
            f"{name}: {x['distinct']} openings in {x['answers']} answers, entropy "
            f"{x['entropy']:.2f} nats{alike}; mean length {plain(x['length'], 1)}; the first token "
            f"is the teacher's most probable one in {plain(x['first_token_rank']['1'], 2)}."
        )
    return found


def _openings(result: Result, folder: Path) -> Any:
    """Shares of openings of every writer, the most frequent of all writers named."""
    writers = result["writers"]
    total: Counter[str] = Counter()
    for x in writers.values():
        for opening in x["openings"]:
            total[opening["text"]] += opening["share"]
    named = [text for text, _ in total.most_common(len(drawing.HATCHES) - 1)]
    with drawing.styled():
        figure, (axis,) = drawing.figure(120 + 42 * len(writers))
        bars: dict[str, Any] = {}
        for place, x in enumerate(writers.values()):
            shares = {o["text"]: o["share"] for o in x["openings"]}
            parts = [(repr(text), shares.get(text, 0.0)) for text in named]
            parts.append(("others", 1 - sum(part for _, part in parts)))
            left = 0.0
            for style, (name, part) in enumerate(parts):
                if part < 1e-9:
                    continue
                bars[name] = axis.barh(
                    place,
                    part,
                    left=left,
                    height=0.6,
                    color=drawing.FILLS[style],
                    hatch=drawing.HATCHES[style],
                    edgecolor="#222222",
                    linewidth=0.6,
                )
                left += part
        bar_axis(axis, list(writers), "share of answers")
        axis.set_xlim(0, 1)
        caption = (
            f"Answers by their first {result['opening_tokens']} tokens; "
            f"{next(iter(writers.values()))['answers']} sampled answers of each writer to the same "
            "problems. The table has the interval of the largest share."
        )
        texts = ("Openings", caption)
        return drawing.picture(figure, bars, folder, "commitment_openings", texts)


def _lengths(result: Result, folder: Path) -> Any:
    with drawing.styled():
        figure, (axis,) = drawing.figure(320)
        lines, runs, shares = {}, defaultdict(list), np.arange(0, 1.01, 0.1).tolist()
        for name, x in result["writers"].items():
            runs[name.partition(", seed ")[0]].append(x["length_deciles"])
        for style, (name, seeds) in enumerate(runs.items()):
            line = drawing.draw_curve(axis, np.mean(seeds, axis=0).tolist(), shares, style)
            axis.hlines(
                shares,
                np.min(seeds, axis=0),
                np.max(seeds, axis=0),
                color=line.get_color(),
                linewidth=1.1,
                alpha=0.8,
            )
            lines[name if len(seeds) == 1 else f"{name}, {len(seeds)} seeds"] = line
        drawing.mark_position(axis, result["limit"], "cut")
        axis.set_xlabel("length of the answer (tokens)")
        axis.set_ylabel("share of answers up to it")
        axis.set_ylim(-0.03, 1.08)
        caption = (
            "Deciles of the lengths of sampled answers, for an arm their means over training seeds "
            "and, as bars, the lowest and highest seed. Those at the cut did not end by "
            "themselves. The table has intervals of the means."
        )
        texts = ("Lengths of answers", caption)
        return drawing.picture(figure, lines, folder, "commitment_lengths", texts)


SECTION = Section(
    name="commitment",
    title="Sub-mode commitment",
    question=(
        "In how many ways does a model begin its answers, are these ways the teacher's, and what "
        "does training do to them?"
    ),
    measure=measure,
    show=show,
)
