"""The headline of a report: ratios, spread and who misses the threshold, worked out by hand."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest

from esr_train.report import summary_table
from esr_train.report.headline import verdicts
from esr_train.report.results import read_run
from esr_train.report.summary import summarise
from tests.report.runs import (
    by_hand,
    headline_of,
    set_baseline,
    summaries_of,
    tune_as_it_is,
    with_mask_only,
    write_arms,
    write_config,
    write_seed,
)


def test_a_headline_with_all_that_it_needs_states_ratios_and_intervals(tmp_path: Path) -> None:
    with_mask_only(tmp_path)
    text = headline_of(tune_as_it_is(tmp_path))
    # seconds by seed: 40 and 10, 45 and 20, 53.3 and 8
    assert text.startswith(
        "Of 2 arms beside full, esr-10 is the quickest: esr-10 is 4.5 times faster than full (95 % "
        "interval 2.2 to 6.7) to greedy accuracy 0.9, 10 s against 45 s of training time"
    )
    assert "7.5 times fewer generated tokens (95 % interval 7.5 to 13.3)" in text
    assert "medians of 3 seeds, each arm at the learning rate that was chosen for it" in text
    assert "(esr-10 1e-05, full 1e-05)" in text
    assert "Greedy accuracy of esr-10 is 0.883 (0.850 to 0.900) at the end and 0.900" in text
    assert "the mask-only arm, whose rollouts are full: mask-10 is 1.78 times slower" in text


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        ("tuning", "no learning rate was chosen per arm on validation seeds"),
        ("seeds", "2 seeds of both arms, of 3 that are needed"),
        ("seeds of an organism", "3 seeds of both arms, of 5 that are needed"),
        ("mask-only", "no mask-only arm beside esr-10 (rollouts as long as full's, the loss on"),
    ],
)
def test_without_what_it_needs_a_headline_has_no_ratio_and_says_so(
    tmp_path: Path, lacking: str, expected: str
) -> None:
    with_mask_only(tmp_path) if lacking != "mask-only" else by_hand(tmp_path)
    if lacking == "seeds":
        shutil.rmtree(tmp_path / "arms" / "esr-10" / "seed2")
    if lacking == "seeds of an organism":
        path = tmp_path / "config.yaml"
        path.write_text(path.read_text().replace("task: prompts", "task: sums"))
    if lacking != "tuning":
        tune_as_it_is(tmp_path)
    run = read_run(tmp_path)
    text = headline_of(run)
    assert text.startswith(f"No headline ratio: {expected}") and text.count(" needed") <= 1
    assert not re.search(r"\d times|interval", text)
    # The facts are there all the same.
    assert "esr-10 reaches greedy accuracy 0.9 after 1" in text and "full reaches" in text


def test_headline_says_slower_where_the_short_arm_loses(tmp_path: Path) -> None:
    lengths = {"esr-10": 10, "full": 100}
    write_config(tmp_path, lengths, seeds=3, data={"task": "prompts"})
    for seed in range(3):
        evals = [(0, 0, 0, 0.1), (20, 10, 2000, 0.9)]
        write_seed(tmp_path, "full", seed, evals)
        write_seed(tmp_path, "esr-10", seed, [(0, 0, 0, 0.1), (20, 40, 4000, 0.9)])
    path = tmp_path / "config.yaml"
    arms = "arms:\n- {name: w, max_new_tokens: 100, loss.window_tokens: 10}\n"
    path.write_text(path.read_text().replace("arms:\n", arms))
    text = headline_of(tune_as_it_is(tmp_path))
    assert "4.0 times slower than full (95 % interval 4.0 to 4.0)" in text
    assert "2.0 times more generated tokens" in text and "as many steps" in text


@pytest.mark.parametrize(
    ("short", "full", "expected"),
    [
        (0.5, 0.95, "does not reach greedy accuracy 0.9 (best 0.500, final 0.500); full reaches"),
        (0.95, 0.5, "full does not reach greedy accuracy 0.9 (best 0.500, final 0.500)"),
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
    for seed, values in enumerate([(0.9, 0.9), (0.9, 0.2), (0.2, 0.2)]):
        for name, value in zip(("full", "esr-10"), values, strict=True):
            write_seed(tmp_path, name, seed, [(0, 0, 0, 0.1), (20, 10 + seed, 50, value)])
    arms = summaries_of(read_run(tmp_path))
    assert (arms["full"].to_threshold["seconds"], arms["full"].reached) == (11, 2)
    assert (arms["esr-10"].to_threshold["seconds"], arms["esr-10"].reached) == (math.inf, 1)
    assert "2 of 3" in summary_table(tmp_path)


def test_missing_baseline_is_said(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 9, 90, 0.9)])
    text = headline_of(read_run(tmp_path))
    assert "esr-10 reaches greedy accuracy 0.9 after 9 s" in text
    assert "full has no evaluation" in text


def test_without_a_baseline_the_quickest_arm_is_named_and_the_others_follow(tmp_path: Path) -> None:
    by_hand(tmp_path)
    set_baseline(tmp_path, None)
    run = read_run(tmp_path)
    text, others = headline_of(run), verdicts(run, summarise(run))
    assert text.startswith("Of 2 arms, esr-10 is the quickest: esr-10 reaches")
    assert "report.baseline names no arm" in text and "times" not in text
    assert len(others) == 1 and others[0].startswith("full reaches greedy accuracy 0.9 after 45 s")
