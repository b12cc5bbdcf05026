"""The headline of a report: ratios, spread and who misses the threshold, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from esr_train.report import summary_table
from esr_train.report.headline import verdicts
from esr_train.report.results import read_run
from esr_train.report.summary import summarise
from tests.report.runs import (
    MIB,
    by_hand,
    headline_of,
    set_baseline,
    summaries_of,
    write_arms,
    write_config,
    write_seed,
)


def test_headline_states_ratios_spread_and_seeds(tmp_path: Path) -> None:
    text = headline_of(by_hand(tmp_path))
    assert "6.0 times faster than full to greedy accuracy 0.9 (10 s against 60 s" in text
    assert "10.0 times fewer generated tokens" in text
    assert "1.50 times lower peak memory" in text
    assert "median of 3 seeds, full's time over esr-10's from 3.0 to 10.0" in text


def test_headline_says_slower_where_the_short_arm_loses(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    write_seed(tmp_path, "full", 0, [(0, 0, 0, 0.1), (20, 10, 2000, 0.95)], peak=100 * MIB)
    write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 40, 4000, 0.95)], peak=200 * MIB)
    text = headline_of(read_run(tmp_path))
    assert "4.0 times slower than full" in text
    assert "2.0 times more generated tokens" in text
    assert "as many steps" in text
    assert "2.0 times higher peak memory" in text
    assert "1 seed" in text


@pytest.mark.parametrize(
    ("short", "full", "expected"),
    [
        (0.5, 0.95, "esr-10 does not reach greedy accuracy 0.9 (best 0.500, final 0.500); full do"),
        (0.95, 0.5, "full does not (best 0.500, final 0.500)"),
        (0.5, 0.6, "Neither esr-10 (best 0.500, final 0.500) nor full (best 0.600, final 0.600) r"),
    ],
    ids=["only-full", "only-short", "neither"],
)
def test_headline_says_plainly_who_misses_the_threshold(
    tmp_path: Path, short: float, full: float, expected: str
) -> None:
    run = write_arms(tmp_path, {"esr-10": [(20, 5, 50, short)], "full": [(20, 5, 50, full)]})
    assert expected in headline_of(run)


def test_threshold_met_before_training_gives_no_ratio(tmp_path: Path) -> None:
    run = write_arms(tmp_path, {name: [(0, 0, 0, 0.93)] for name in ("esr-10", "full")})
    assert math.isnan(summaries_of(run)["esr-10"].ratios["seconds"].middle)
    assert "before any training" in headline_of(run)


def test_seed_that_misses_counts_as_infinite_in_the_median(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100}, seeds=3)
    for seed, values in enumerate([(0.95, 0.95), (0.95, 0.2), (0.2, 0.2)]):
        for name, value in zip(("full", "esr-10"), values, strict=True):
            write_seed(tmp_path, name, seed, [(0, 0, 0, 0.1), (20, 10 + seed, 50, value)])
    arms = summaries_of(read_run(tmp_path))
    assert (arms["full"].to_threshold["seconds"], arms["full"].reached) == (11, 2)
    assert (arms["esr-10"].to_threshold["seconds"], arms["esr-10"].reached) == (math.inf, 1)
    assert "2 of 3" in summary_table(tmp_path)


def test_missing_baseline_is_said(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 9, 90, 0.95)])
    text = headline_of(read_run(tmp_path))
    assert text.startswith("esr-10 reaches greedy accuracy 0.9 after 9 s")
    assert "full has no evaluation" in text


def test_without_a_baseline_the_quickest_arm_is_named_and_the_others_follow(tmp_path: Path) -> None:
    by_hand(tmp_path)
    set_baseline(tmp_path, None)
    run = read_run(tmp_path)
    text, others = headline_of(run), verdicts(run, summarise(run))
    assert text.startswith("Of 2 arms, esr-10 is the quickest: esr-10 reaches")
    assert "report.baseline names no arm" in text and "times" not in text
    assert len(others) == 1 and others[0].startswith("full reaches greedy accuracy 0.9 after 60 s")
