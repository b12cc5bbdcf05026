"""Openings, habits, ranks and lengths on texts and chains where they are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from esr_train.diagnose import commitment
from esr_train.tasks.sums import SumsTask, step_by_step, wordy_guess
from tests.diagnose.chains import chain_config, path
from tests.diagnose.test_measure import open_bench


def test_openings_are_counted_and_their_entropy_is_that_of_the_shares() -> None:
    found = commitment.openings([(1, 2)] * 6 + [(1, 3)] * 2, samples=1)
    assert found["distinct"] == 2
    assert found["entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found["top"]["mean"] == 0.75
    assert [o["share"] for o in found["openings"]] == [0.75, 0.25]
    # 6 * 5 + 2 * 1 ordered pairs of different problems, of 8 * 7
    assert found["alike"] == pytest.approx(32 / 56)


def test_samples_of_one_problem_are_no_evidence_that_problems_open_alike() -> None:
    found = commitment.openings([(1,), (1,), (2,), (2,)], samples=2)
    assert found["alike"] == 0
    assert commitment.openings([(1,), (1,)], samples=2)["alike"] is None


def test_one_opening_has_entropy_0() -> None:
    found = commitment.openings([(7,)] * 10, samples=1)
    assert (found["distinct"], found["entropy"], found["alike"]) == (1, 0.0, 1.0)


def test_forks_are_the_tenth_with_the_largest_divergence() -> None:
    kl = np.full((2, 30), np.nan)
    kl[0] = np.arange(30)
    kl[1, :4] = [0.0, 5.0, 1.0, 2.0]
    chosen = commitment.forks(kl)
    assert chosen[0].nonzero()[0].tolist() == [27, 28, 29]
    assert chosen[1].nonzero()[0].tolist() == [1]


def test_a_student_of_two_modes_is_told_from_a_teacher_of_one(tmp_path: Path) -> None:
    """The student opens with "b" or "m", the teacher with "b" alone, and its third is "n"."""
    student = path("abcd") | path("mn") | {"a": {"b": 0.3, "m": 0.7}}
    teacher = path("abcd") | path("mn") | {"a": {"b": 0.9, "n": 0.08, "m": 0.02}}
    config = chain_config(tmp_path, student, teacher, problems=40)
    result = commitment.measure(open_bench(config, tmp_path))
    of = result["writers"]
    assert list(of) == ["teacher", "student", "train, seed 0"]
    assert {o["text"] for o in of["student"]["openings"]} == {"bcd", "mn"}
    assert of["student"]["openings"][0]["text"] == "mn"
    top = of["student"]["top"]
    assert top["low"] <= 0.7 <= top["high"]
    rank = of["student"]["first_token_rank"]
    assert rank["1"]["mean"] == pytest.approx(1 - top["mean"])
    assert rank["2 to 5"]["mean"] == pytest.approx(top["mean"])
    # At the fork, the first token, the student's argmax "m" is the teacher's third.
    assert of["student"]["fork_rank"]["2 to 5"]["mean"] == 1
    lengths = of["student"]["length"]["mean"]
    assert lengths == pytest.approx(4 - top["mean"])  # "bcd." or "mn."
    assert of["student"]["stopped"]["mean"] == 1
    assert of["teacher"]["entropy"] < of["student"]["entropy"]


def test_the_habits_of_sums_are_told_apart() -> None:
    import random

    task = SumsTask()
    rng = random.Random(0)
    assert task.habit(step_by_step([23, 45, 67, 12])) == "step by step"
    assert {task.habit(wordy_guess([23, 45, 67, 12], rng)) for _ in range(20)} == {"guess"}
    assert task.habit("12+13=25") == "other"
