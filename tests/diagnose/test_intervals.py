"""Means over problems and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from esr_train.diagnose.intervals import (
    by_position,
    by_problem,
    interval,
    paired,
    position_edges,
    relative,
    share,
)

nan = np.nan


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["problems"] == 400
    assert found["high"] - found["mean"] == pytest.approx(half, rel=0.1)
    assert found["mean"] - found["low"] == pytest.approx(half, rel=0.1)


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    drawn = [interval(rng.exponential(1.0, size=40)) for _ in range(200)]
    covered = sum(found["low"] <= 1.0 <= found["high"] for found in drawn)
    assert 178 <= covered <= 198  # 95 % of 200, a little less for a skewed law of 40


def test_pairs_find_a_change_that_problems_of_unequal_difficulty_hide() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(0.0, 10.0, size=50)
    after = before - 0.5 + rng.normal(0.0, 0.1, size=50)
    assert paired(after, before)["high"] < -0.4
    apart = interval(after)["high"] - interval(before)["mean"]
    assert apart > 0


def test_pairs_leave_out_problems_that_one_side_lacks() -> None:
    found = paired(np.array([1.0, nan, 3.0]), np.array([0.0, 5.0, nan]))
    assert (found["mean"], found["problems"], found["low"]) == (1.0, 1, None)


def test_a_relative_change_is_of_means_over_the_same_problems() -> None:
    before = np.array([1.0, 2.0, 3.0, 4.0, nan, 100.0])
    after = np.array([0.5, 1.0, 1.5, 2.0, 7.0, nan])
    found = relative(after, before)
    assert (found["mean"], found["problems"]) == (-0.5, 4)
    assert relative(np.zeros(6), np.zeros(6))["mean"] is None


def test_a_share_of_which_all_problems_agree_has_an_interval_with_a_width() -> None:
    ones, zeros = share(np.ones(20)), share(np.zeros(20))
    assert (ones["high"], zeros["low"]) == (1.0, 0.0)
    assert ones["low"] == pytest.approx(0.8316, abs=1e-3)  # Clopper and Pearson, 20 of 20
    assert zeros["high"] == pytest.approx(0.1684, abs=1e-3)
    mixed = np.array([0.0, 1.0] * 10)
    assert share(mixed) == interval(mixed)


def test_samples_of_a_problem_count_as_one_problem() -> None:
    found = by_problem(np.array([1.0, 0.0, nan, 4.0, nan, nan]), 2)
    assert np.array_equal(found, [0.5, 4.0, nan], equal_nan=True)


def test_bins_average_the_tokens_of_a_problem_in_them() -> None:
    values = np.array([[1.0, 2.0, 4.0, nan], [5.0, nan, nan, nan], [7.0, 8.0, nan, nan]])
    found = by_position(np.concatenate([values, np.full((1, 4), nan)]), [0, 1, 4], samples=2)
    assert np.array_equal(found, [[3.0, 3.0], [7.0, 8.0]], equal_nan=True)


def test_edges_double_and_have_the_window_in_them() -> None:
    assert position_edges(40, [16, 20, 40, 99]) == [0, 1, 2, 4, 8, 16, 20, 32, 40]
    assert position_edges(1) == [0, 1]
