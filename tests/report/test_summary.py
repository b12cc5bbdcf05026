"""The numbers of a report, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from esr_train.report.results import read_run
from esr_train.report.statistics import bootstrap, crossing, mean_difference, ratio_of_medians
from esr_train.report.summary import summarise
from tests.report.runs import (
    MIB,
    by_hand,
    headline_of,
    set_baseline,
    summaries_of,
    tune_as_it_is,
    write_config,
    write_rows,
    write_seed,
)


def test_a_crossing_is_interpolated_between_two_evaluations(tmp_path: Path) -> None:
    run = by_hand(tmp_path)
    arms = summaries_of(run)
    # full: at the third evaluation, at 0.9 exactly; then half and a third of the way from 0.8.
    found = [crossing(run, seed) for seed in run.arms[-1].seeds]
    assert [item.cost["seconds"] for item in found if item] == pytest.approx([40, 45, 160 / 3])
    assert arms["full"].to_threshold == pytest.approx({"seconds": 45, "tokens": 1500, "steps": 15})
    assert arms["full"].bracket["seconds"] == (30, 60) and arms["full"].bracket["steps"] == (10, 20)
    # esr-10 at 10, 20 and (second evaluation, although it falls below later) 8 s.
    assert arms["esr-10"].to_threshold == {"seconds": 10, "tokens": 200, "steps": 20}
    assert arms["esr-10"].reached == arms["esr-10"].evaluated == 3


def test_ratios_are_of_medians(tmp_path: Path) -> None:
    arm = summaries_of(by_hand(tmp_path))["esr-10"]
    assert (arm.ratios["seconds"].middle, arm.ratios["seconds"].count) == (pytest.approx(4.5), 3)
    assert arm.ratios["tokens"].middle == pytest.approx(7.5)
    # steps: 20 and 20, 15 and 20, 13.3 and 10; every ratio of two of their medians may be drawn
    steps = arm.ratios["steps"]
    assert (steps.low, steps.middle, steps.high) == pytest.approx((0.75, 0.75, 4 / 3))
    assert arm.memory_ratio == pytest.approx(1.5)
    assert arm.speedup_per_step == pytest.approx(4)
    assert arm.step_seconds == pytest.approx({"rollout": 0.35, "teacher": 0.05, "student": 0.1})
    assert (arm.tokens_per_step, arm.peak) == (10, 200 * MIB)


def test_ratios_refer_to_the_named_arm(tmp_path: Path) -> None:
    by_hand(tmp_path)
    forwards = summaries_of(read_run(tmp_path))["esr-10"].ratios["seconds"]
    set_baseline(tmp_path, "esr-10")
    arms = summaries_of(read_run(tmp_path))
    backwards = arms["full"].ratios["seconds"]
    assert backwards.middle == pytest.approx(1 / forwards.middle)
    assert (backwards.low, backwards.high) == pytest.approx((1 / forwards.high, 1 / forwards.low))
    assert arms["full"].memory_ratio == pytest.approx(1 / 1.5)
    assert arms["esr-10"].ratios["seconds"].middle == 1
    # full is not truncated, so that it needs no mask-only arm beside it
    text = headline_of(tune_as_it_is(tmp_path))
    assert "full is 4.5 times slower than esr-10" in text


def test_an_interval_is_of_pairs() -> None:
    assert bootstrap([(1, 4), (10, 40)], ratio_of_medians) == (4, 4)  # in each pair the same ratio
    assert bootstrap([(1, 2), (1, 4)], ratio_of_medians) == (2, 4)
    assert bootstrap([(1, 2), (1, math.inf)], ratio_of_medians) == (2, math.inf)
    assert bootstrap([(5, 3), (9, 6), (2, 0)], mean_difference) == (2, 3)
    assert all(map(math.isnan, bootstrap([(1, 2)], ratio_of_medians)))
    # About 1.96 standard errors of a mean, of many pairs.
    noise = np.random.default_rng(1).normal(size=200)
    low, high = bootstrap([(value, 0.0) for value in noise], mean_difference)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(200), rel=0.1)


def test_values_at_equal_cost_are_where_the_cheaper_run_ends(tmp_path: Path) -> None:
    at = summaries_of(by_hand(tmp_path))["esr-10"].at_equal["seconds"]
    # esr-10 ends at 10, 20 and 16 s, where full is half, two thirds and two fifths of its way from
    # 0.1 at 0 s to 0.8 at 20, 30 and 40 s.
    full = [0.1 + 0.7 * share for share in (1 / 2, 2 / 3, 2 / 5)]
    assert at.cost == pytest.approx(46 / 3)
    assert (at.own.middle, at.own.low) == (pytest.approx(2.65 / 3), 0.85)
    assert (at.base.middle, at.base.low) == pytest.approx((sum(full) / 3, full[2]))
    assert at.difference.middle == pytest.approx((2.65 - sum(full)) / 3)
    assert at.difference.low < at.difference.middle < at.difference.high
    tokens = summaries_of(by_hand(tmp_path))["esr-10"].at_equal["tokens"]
    assert (tokens.cost, tokens.base.middle) == pytest.approx((200, 0.1 + 0.7 * 0.2))


def test_how_runs_end(tmp_path: Path) -> None:
    write_config(tmp_path, {"full": 100}, seeds=3)
    for seed, values in enumerate([(0.1, 0.9, 0.3), (0.1, 0.5, 0.5), (0.1, 0.2, 0.05)]):
        evals = [(10 * i, i, i, value) for i, value in enumerate(values)]
        write_seed(tmp_path, "full", seed, evals, extra=lambda step: {"eos_rate": 1 - step / 40})
    end = summaries_of(read_run(tmp_path))["full"].stability
    assert (end.drop.middle, end.drop.low) == (pytest.approx(0.75 / 3), 0)
    assert end.drop.high == pytest.approx(0.6)
    assert (end.below_start, end.eos_rate) == (1, 0.5)
    assert end.rollout_eos_rate == pytest.approx(100 / 2e4 + 20 / 400)


def test_without_a_baseline_there_are_no_ratios(tmp_path: Path) -> None:
    by_hand(tmp_path)
    set_baseline(tmp_path, None)
    for item in summarise(read_run(tmp_path)):
        assert all(math.isnan(spread.middle) for spread in item.ratios.values())
        assert math.isnan(item.speedup_per_step) and math.isnan(item.memory_ratio)
        assert math.isfinite(item.to_threshold["seconds"])


def test_final_and_best_are_means_with_extremes(tmp_path: Path) -> None:
    arm = summaries_of(by_hand(tmp_path))["esr-10"]
    # final 0.9, 0.9, 0.85; best 0.9 of all
    assert arm.final.middle == pytest.approx(2.65 / 3)
    assert (arm.final.low, arm.final.high) == (0.85, 0.9)
    assert (arm.best.middle, arm.start.middle) == pytest.approx((0.9, 0.1))


def test_lower_is_better_turns_threshold_and_best_around(tmp_path: Path) -> None:
    report = {"metric": "kl", "threshold": 0.3, "higher_is_better": False}
    write_config(tmp_path, {"full": 100}, report=report)
    target = write_seed(tmp_path, "full", 0, [(20, 9, 9, None)])
    values = [(0, 1.0), (10, 0.3), (20, 0.4)]
    write_rows(
        target / "evals.jsonl",
        [{"step": s, "train_seconds": s, "tokens": s, "metrics": {"kl": v}} for s, v in values],
    )
    arm = summaries_of(read_run(tmp_path))["full"]
    assert (arm.to_threshold["steps"], arm.best.middle, arm.final.middle) == (10, 0.3, 0.4)


def test_fp32_mean_just_below_the_threshold_counts(tmp_path: Path) -> None:
    write_config(tmp_path, {"full": 100})
    write_seed(tmp_path, "full", 0, [(20, 5, 50, float(np.float32(0.9)) - 3e-8)])
    assert summaries_of(read_run(tmp_path))["full"].reached == 1
