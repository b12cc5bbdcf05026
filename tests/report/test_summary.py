"""The numbers of a report, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from esr_train.report.results import read_run
from esr_train.report.summary import summarise
from tests.report.runs import (
    MIB,
    by_hand,
    headline_of,
    set_baseline,
    summaries_of,
    write_config,
    write_rows,
    write_seed,
)


def test_threshold_is_the_first_evaluation_at_or_past_it(tmp_path: Path) -> None:
    arms = summaries_of(by_hand(tmp_path))
    # full passes at its third evaluation: 40, 60, 80 s; the first seed exactly at 0.9.
    assert arms["full"].to_threshold == {"seconds": 60, "tokens": 2000, "steps": 20}
    # esr-10 passes at 10, 20 and (second evaluation, although it falls below later) 8 s.
    assert arms["esr-10"].to_threshold == {"seconds": 10, "tokens": 200, "steps": 20}
    assert arms["esr-10"].reached == arms["esr-10"].evaluated == 3


def test_ratios_are_of_medians_and_their_spread_is_by_seed(tmp_path: Path) -> None:
    arm = summaries_of(by_hand(tmp_path))["esr-10"]
    # by seed: 40/10, 60/20, 80/8
    assert (arm.ratios["seconds"].middle, arm.ratios["seconds"].low) == (6, 3)
    assert arm.ratios["seconds"].high == 10
    assert arm.ratios["tokens"].middle == 10
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
    assert "full is 6.0 times slower than esr-10" in headline_of(read_run(tmp_path))


def test_without_a_baseline_there_are_no_ratios(tmp_path: Path) -> None:
    by_hand(tmp_path)
    set_baseline(tmp_path, None)
    for item in summarise(read_run(tmp_path)):
        assert all(math.isnan(spread.middle) for spread in item.ratios.values())
        assert math.isnan(item.speedup_per_step) and math.isnan(item.memory_ratio)
        assert math.isfinite(item.to_threshold["seconds"])


def test_final_and_best_are_means_with_extremes(tmp_path: Path) -> None:
    arm = summaries_of(by_hand(tmp_path))["esr-10"]
    # final 0.92, 0.92, 0.88; best 0.92, 0.92, 0.95
    assert arm.final.middle == pytest.approx(2.72 / 3)
    assert (arm.final.low, arm.final.high) == (0.88, 0.92)
    assert arm.best.middle == pytest.approx(2.79 / 3)
    assert (arm.best.low, arm.best.high) == (0.92, 0.95)


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
