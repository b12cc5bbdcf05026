"""Position against signal: do the tokens that a signal selects lie in the first N?

For every answer of the untrained student that is longer than N tokens, a signal selects its N
highest tokens; ties are broken at random, so that a signal without information is chance.

    overlap   = |selected and first N| / N
    chance    = N / length
    kl share  = sum of KL(student || teacher) over the selected / over the answer

An overlap says which tokens are chosen, not which are worth training on; that takes arms.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esr_train.diagnose import drawing
from esr_train.diagnose.bench import Bench, windows
from esr_train.diagnose.drawing import plain
from esr_train.diagnose.intervals import by_problem, interval, paired
from esr_train.diagnose.measure import TokenValues
from esr_train.diagnose.section import Result, Section, Shown
from esr_train.report.axes import bar_axis

_SEED = 0  # of ties and of the random selection

SIGNALS: dict[str, Callable[[TokenValues], np.ndarray]] = {
    "H(student)": lambda x: x.student_entropy,
    "H(teacher)": lambda x: x.teacher_entropy,
    "KL": lambda x: x.reverse_kl,
    "KL forward": lambda x: x.forward_kl,
    "|log-ratio|": lambda x: x.log_ratio,
    "H(student) H(teacher)": lambda x: x.student_entropy * x.teacher_entropy,
    "KL H(student)": lambda x: x.reverse_kl * x.student_entropy,
    "KL H(teacher)": lambda x: x.reverse_kl * x.teacher_entropy,
    "KL H(student) H(teacher)": lambda x: x.reverse_kl * x.student_entropy * x.teacher_entropy,
    "random": lambda x: np.where(np.isnan(x.reverse_kl), np.nan, 0.0),
}


def measure(bench: Bench) -> Result:
    values = bench.on_student
    found = [of_window(values, n, bench.samples) for n in windows(bench.config)]
    return {"answers": len(values.reverse_kl), "windows": found}


def of_window(values: TokenValues, n: int, samples: int) -> Result:
    """Overlaps at a budget of n tokens an answer, for every signal."""
    kl = values.reverse_kl
    known = ~np.isnan(kl)
    lengths = known.sum(1)
    long = lengths > n
    chance = by_problem(np.where(long, n / np.maximum(lengths, 1), np.nan), samples)
    first = np.broadcast_to(np.arange(kl.shape[1]) < n, kl.shape)
    result: Result = {
        "n": n,
        "answers": int(long.sum()),
        "chance": interval(chance),
        "first_kl_share": interval(by_problem(_kl_share(kl, first, long), samples)),
        "signals": {},
    }
    place = np.arange(1, kl.shape[1] + 1)
    for name, signal in SIGNALS.items():
        chosen = select(signal(values), n)
        overlap = np.where(long, (chosen & first).sum(1) / n, np.nan)
        middle = np.where(long, (chosen * place).sum(1) / np.maximum(chosen.sum(1), 1), np.nan)
        of_problem = by_problem(overlap, samples)
        result["signals"][name] = {
            "overlap": interval(of_problem),
            "above_chance": paired(of_problem, chance),
            "kl_share": interval(by_problem(_kl_share(kl, chosen, long), samples)),
            "mean_position": interval(by_problem(middle, samples)),
        }
    return result


def select(signal: np.ndarray, n: int) -> np.ndarray:
    """[B, N] bool: the n highest tokens of each row, NaN never; ties at random."""
    draws = np.random.default_rng(_SEED).random(signal.shape)
    order = np.lexsort((draws, -signal), axis=1)  # NaN sorts last
    chosen = np.zeros(signal.shape, dtype=bool)
    np.put_along_axis(chosen, order[:, :n], True, axis=1)
    return chosen & ~np.isnan(signal)


def _kl_share(kl: np.ndarray, chosen: np.ndarray, long: np.ndarray) -> np.ndarray:
    total = np.nansum(kl, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(chosen, np.nan_to_num(kl), 0.0).sum(1) / total
    return np.where(long & (total > 0), found, np.nan)


def show(result: Result, folder: Path) -> Shown:
    windows = [x for x in result["windows"] if x["answers"]]
    if not windows:
        return Shown(["Not measured: no answer is longer than a window."])
    tables, findings = [], []
    for window in windows:
        table = [["signal", "overlap", "minus chance", "share of the KL", "mean position"]]
        table.append(["first N", "1", "-", plain(window["first_kl_share"], 2), "-"])
        for name, x in window["signals"].items():
            cells = (plain(x[key], 2) for key in ("overlap", "above_chance", "kl_share"))
            table.append([name, *cells, plain(x["mean_position"], 1)])
        title = f"N = {window['n']}, {window['answers']} answers that are longer"
        tables.append((title, table))
        kl = window["signals"]["KL"]
        findings.append(
            f"Of the {window['n']} tokens with the largest KL(student || teacher), "
            f"{plain(kl['overlap'], 2)} are among the first {window['n']}; chance is "
            f"{plain(window['chance'], 2)}, the difference {drawing.verdict(kl['above_chance'])}. "
            f"They have {plain(kl['kl_share'], 2)} of the divergence, the first {window['n']} "
            f"{plain(window['first_kl_share'], 2)}."
        )
    return Shown(findings, tables, [_picture(windows, folder)])


def _picture(windows: list[Result], folder: Path) -> Any:
    with drawing.styled():
        figure, axes = drawing.figure(120 + 30 * len(SIGNALS), len(windows))
        for number, (axis, window) in enumerate(zip(axes, windows, strict=True)):
            found = [window["signals"][name]["overlap"] for name in SIGNALS]
            drawing.draw_dots(axis, found, 0)
            bar_axis(axis, list(SIGNALS) if number == 0 else [""] * len(SIGNALS), "")
            axis.set_xlim(-0.03, 1.03)
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
            drawing.mark_position(axis, window["chance"]["mean"], "")
            axis.set_title(f"N = {window['n']}, dashed: chance", fontsize=9)
            axis.set_xlabel("share of the selected\namong the first N")
        counts = ", ".join(f"{x['answers']} for N = {x['n']}" for x in windows)
        caption = (
            "Each signal selects the N highest tokens of an answer of the untrained student; "
            f"answers longer than N only: {counts}. Bars: 95 % bootstrap intervals over problems."
        )
        texts = ("Overlap of what a signal selects with the first N tokens", caption)
        return drawing.picture(figure, {}, folder, "signals_overlap", texts)


SECTION = Section(
    name="signals",
    title="Position against signal",
    question=(
        "At an equal budget of N tokens an answer, do entropies, divergences and their products "
        "select the first N tokens, or others?"
    ),
    measure=measure,
    show=show,
)
