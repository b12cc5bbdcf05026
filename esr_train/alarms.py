"""Alarms: what a run's own numbers say is going wrong, in words.

    alarms = Alarms(earlier_rows, earlier_evaluations)
    alarms.of_step(row)             # ["repetition"]
    MEANING["repetition"]           # what it means, and what to do

A rule compares the mean of the last five steps with that of the first five, or the newest
evaluation with the first, so that what a student was like before training raises none.
docs/alarms.md has the table of rules. An alarm changes nothing in a run, and is a function of its
rows: a resumed run has the same ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]

WINDOW = 5  # steps in the means that are compared
ENTROPY_OF_FIRST, ENTROPY_OF_TEACHER = 0.2, 0.5
EOS_SEEN, EOS_OF_FIRST = 0.2, 0.25
ENDED, ENDED_LESS = 0.5, 0.25
REPEATED, REPEATED_MORE = 0.5, 0.2
LOGPROB_GAP = 0.1

MEANING = {
    "not_finite": "a number of this step is NaN or infinite, though its loss is not. Look at the "
    "row in metrics.jsonl; try runtime.dtype=float32, or a lower optim.lr",
    "entropy_collapse": "the student's entropy is less than a fifth of what it was, and less than "
    "half the teacher's: it says one thing only. Lower optim.lr, or try loss.divergence=jsd or "
    "forward_kl, which ask for all that the teacher would say",
    "eos_vanishing": "a quarter or less of the responses that used to end within the rollout still "
    "do. Keep loss.train_on_eos=true; where student and teacher end answers by different tokens, "
    "set loss.merge_terminators=true; or raise rollout.max_new_tokens",
    "answers_to_the_cap": "most answers in evaluation run to eval.max_new_tokens, which they did "
    "not before training: the student forgets how to stop. Raise rollout.max_new_tokens so that "
    "responses end in training too, and lower optim.lr",
    "repetition": "more than half of what is sampled, in runs of four tokens, repeats the same "
    "response. Lower optim.lr, go back to an earlier checkpoint, or shorten rollout.max_new_tokens",
    "logprobs_apart": "the engine that samples and the forward pass that is trained disagree on "
    "the log-probs of sampled tokens by more than 0.1 nats: training is not on-policy. Try "
    "runtime.attention=eager, runtime.compile=false, or runtime.dtype=float32",
    "server_logprobs_apart": "the server that samples and the initial student disagree on the "
    "log-probs of sampled tokens by more than 0.1 nats: the server has another model, or the same "
    "one in fewer bits. Serve student.model (where student.drop_layers is set, its export) in "
    "runtime.dtype; of several models there, rollout.served_name chooses one",
}


class Alarms:
    """The rules, over the rows of metrics.jsonl and the metrics of evaluations.

    Args:
        rows, evaluations: those of metrics.jsonl and evals.jsonl that a resumed run goes on from.
    """

    def __init__(self, rows: Iterable[Row] = (), evaluations: Iterable[Row] = ()) -> None:
        self._first: list[Row] = []
        self._last: deque[Row] = deque(maxlen=WINDOW)
        self._ended: float | None = None  # eos_rate of the first evaluation
        for row in rows:
            self.of_step(row)
        for row in evaluations:
            self.of_evaluation(row["metrics"])

    def of_step(self, row: Row) -> list[str]:
        """Names of the alarms that a step raises; call it once a step, in order."""
        if len(self._first) < WINDOW:
            self._first.append(row)
        self._last.append(row)
        found = []
        if not all(map(math.isfinite, _numbers(row))):
            found.append("not_finite")
        if row.get("logprob_gap", 0.0) > LOGPROB_GAP:
            found.append("server_logprobs_apart" if "engine" in row else "logprobs_apart")
        if (
            self._last[0]["step"] > self._first[-1]["step"]
        ):  # the two windows have no step in common
            found += [name for name, rule in _RULES.items() if rule(self._was, self._is)]
        return found

    def of_evaluation(self, metrics: dict[str, float]) -> list[str]:
        """Names of the alarms that an evaluation raises."""
        ended = metrics.get("eos_rate")
        if ended is None or math.isnan(ended):
            return []
        if self._ended is None:
            self._ended = ended
        fell = ended <= self._ended - ENDED_LESS
        return ["answers_to_the_cap"] if fell and ended < ENDED else []

    def _was(self, key: str) -> float:
        return sum(row.get(key, math.nan) for row in self._first) / len(self._first)

    def _is(self, key: str) -> float:
        return sum(row.get(key, math.nan) for row in self._last) / len(self._last)


Mean = Callable[[str], float]


def _entropy_collapse(was: Mean, now: Mean) -> bool:
    entropy = now("student_entropy")
    return entropy < ENTROPY_OF_FIRST * was(
        "student_entropy"
    ) and entropy < ENTROPY_OF_TEACHER * now("teacher_entropy")


def _eos_vanishing(was: Mean, now: Mean) -> bool:
    return was("eos_rate") >= EOS_SEEN and now("eos_rate") <= EOS_OF_FIRST * was("eos_rate")


def _repetition(was: Mean, now: Mean) -> bool:
    return now("repetition") > max(REPEATED, was("repetition") + REPEATED_MORE)


_RULES = {
    "entropy_collapse": _entropy_collapse,
    "eos_vanishing": _eos_vanishing,
    "repetition": _repetition,
}


def _numbers(row: Row) -> list[float]:
    return [value for value in row.values() if isinstance(value, (int, float))]


class Announcer:
    """Says each kind of alarm once in a run, and counts the others."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._steps = say, dict[tuple[str, str], list[int]]()

    def __call__(self, row: Row, run: str = "") -> None:
        """Announce the alarms of a step's row; `run` names one of several."""
        for name in row["alarms"]:
            steps = self._steps.setdefault((run, name), [])
            steps.append(row["step"])
            if len(steps) == 1:
                where = f"{run}, step" if run else "step"
                self._say(f"alarm {name} ({where} {row['step']}): {MEANING[name]}")

    def counts(self) -> list[str]:
        """One line for each kind that was raised more than once."""
        return [
            f"alarm {name}: at {len(steps)} steps, from {steps[0]} to {steps[-1]}"
            + (f", of {run}" if run else "")
            for (run, name), steps in self._steps.items()
            if len(steps) > 1
        ]
