"""The report: numbers worked out by hand, and runs that are incomplete, broken or hostile."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esr_train.figures import band, draw_pictures
from esr_train.headline import headline, verdicts
from esr_train.report import summary_table, write_report
from esr_train.results import read_run, summarise
from tests.report_runs import (
    MIB,
    by_hand,
    realistic,
    summaries_of,
    write_config,
    write_rows,
    write_seed,
)

FIGURES = ["metric_seconds", "metric_tokens", "metric_steps", "divergence", "length_eos"]
FIGURES += ["phase_seconds", "peak_memory"]


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


def test_baseline_is_the_longest_arm_in_any_order_and_spelling(tmp_path: Path) -> None:
    arms = [
        {"name": "whole"},
        {"name": "tail", "loss.window_tokens": 8},
        {"name": "a", "rollout.max_new_tokens": 8},
    ]
    for order in (arms, arms[::-1]):
        write_config(tmp_path, {}, arms=order)
        assert [arm.name for arm in read_run(tmp_path).arms] == ["a", "tail", "whole"]


def test_null_and_nan_metrics_are_skipped(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    evals = [(0, 0, 0, 0.1), (10, 5, 50, None), (15, 6, 60, math.nan), (20, 9, 90, 0.91)]
    for name in ("esr-10", "full"):
        write_seed(tmp_path, name, 0, evals, peak=None)
    arm = summaries_of(read_run(tmp_path))["full"]
    assert (arm.to_threshold["seconds"], arm.final.middle) == (9, 0.91)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]+", "", page), re.IGNORECASE)
    assert not (tmp_path / "figures" / "peak_memory.png").exists()
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_killed_run_is_reported_as_far_as_it_went(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "esr-20": 20, "full": 100}, seeds=2)
    write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 9, 90, 0.95)])
    write_seed(tmp_path, "esr-10", 1, [])
    cut = write_seed(tmp_path, "full", 0, [(0, 0, 0, 0.1), (10, 9, 90, 0.5)])
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "seconds": {"roll')
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for note in (
        "full/seed0/metrics.jsonl, line 11: unreadable, skipped.",
        "full, seed 0: stopped at step 10 of 20.",
        "full: no results for seed 1.",
        "esr-10, seed 1: stopped at step 3 of 20.",
        "esr-20: no results.",
    ):
        assert note in page
        assert note in summary_table(tmp_path)
    assert "esr-20 has no evaluation of greedy_accuracy" in page


def test_run_without_any_results_still_gives_a_report(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    (tmp_path / "environment.json").unlink()
    assert "There is nothing to draw yet" in write_report(tmp_path).read_text(encoding="utf-8")
    assert "environment.json is missing" in summary_table(tmp_path)


def test_missing_baseline_is_said(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 9, 90, 0.95)])
    run = read_run(tmp_path)
    text = headline(run, summarise(run))
    assert text.startswith("esr-10 reaches greedy accuracy 0.9 after 9 s")
    assert "full has no evaluation" in text


def test_single_arm_is_reported_without_a_comparison(tmp_path: Path) -> None:
    write_config(tmp_path, {"train": 100})
    write_seed(tmp_path, "train", 0, [(0, 0, 0, 0.1), (20, 9, 90, 0.95)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "train reaches greedy accuracy 0.9 after 9 s" in page
    assert "against full" not in page and "All arms" not in page


def test_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    for call in (write_report, summary_table):
        with pytest.raises(FileNotFoundError, match=r"run directory .*nowhere: no config.yaml"):
            call(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": []}, "arms: expected a list"),
        ({"arms": [{"max_new_tokens": 3}]}, "arms: each needs a name"),
        ({"arms": [{"name": "a", "max_new_tokens": "x"}]}, "a has no max_new_tokens"),
        ({"report": {"threshold": 0.9}}, "report.metric"),
        ({"report": {"metric": "a", "threshold": "high"}}, "report.threshold"),
    ],
    ids=["no-arms", "no-name", "no-length", "no-metric", "no-threshold"],
)
def test_unusable_config_names_the_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(tmp_path, {"full": 100}, **changes)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_samples_are_escaped_and_text_that_breaks_files_is_replaced(tmp_path: Path) -> None:
    write_config(tmp_path, {"<b>$x$": 10, "full": 100})
    nasty = "<script>alert(1)</script> & ```` \x00 \ud800 $\\frac{$"
    samples = [{"step": 0, "prompt": nasty, "response": nasty}]
    for name in ("<b>$x$", "full"):
        write_seed(tmp_path, name, 0, [(0, 0, 0, 0.1), (20, 5, 50, 0.95)], samples=samples)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "<b>$x$" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; ```` \ufffd \ufffd" in page
    assert "`````\n<script>" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_report_is_self_contained_and_complete(tmp_path: Path) -> None:
    realistic(tmp_path, seeds=2)
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text = page.read_text(encoding="utf-8")
    names = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert names == {*FIGURES, "eval_sampled_accuracy", "eval_heldout_kl"}
    assert text.count('src="data:image/png;base64,iVBOR') == len(names)
    outside = re.sub(r"base64,[^\"]+", "", text)
    assert not re.search(r"https?://|url\(|<script|<link|@import", outside)
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert {Path(link).stem for link in re.findall(r"\]\((figures/.*?)\)", markdown)} == names
    assert "not evidence about LLMs" in text and "8-core test CPU" in text
    for arm in verdicts(run := read_run(tmp_path), summarise(run)):
        assert arm in markdown


def test_wide_figures_have_two_pixels_a_css_pixel(tmp_path: Path) -> None:
    run = by_hand(tmp_path)
    pictures = draw_pictures(run, summarise(run), tmp_path / "figures")
    for picture in pictures:
        width = int.from_bytes(picture.path.read_bytes()[16:20], "big")
        assert width == (1600 if picture.wide else 800)


def test_table_fits_a_terminal_of_100_columns(tmp_path: Path) -> None:
    long = "an-arm-with-a-name-longer-than-any-column-of-a-table-" * 3
    write_config(tmp_path, {long: 10, "full": 100}, seeds=2)
    for seed in range(2):
        evals = [(0, 0, 0, 0.1), (20, 123456.7 + seed, 987654321, 0.987654 + seed / 1e4)]
        write_seed(tmp_path, "full", seed, evals, peak=80 * 2**30)
        evals = [(0, 0, 0, 0.1), (20, 11111.1 + seed, 87654321, 0.987654 + seed / 1e4)]
        write_seed(tmp_path, long, seed, evals, peak=2**30)
    table = summary_table(tmp_path)
    assert max(len(line) for line in table.splitlines()) <= 100
    # nothing may be lost to the limit: the last column of both tables is whole
    assert re.search(r"87,654,321 \(11.3x\)  20 \(1.00x\)\n.* 987,654,321 +20\n", table)
    assert "80.00 GiB" in table and "1.00 GiB (80.0x)" in table


def test_band_interpolates_on_the_union_of_points_and_holds_finished_seeds() -> None:
    short = (np.array([0.0, 2.0]), np.array([0.0, 1.0]))
    long = (np.array([0.0, 4.0]), np.array([0.0, 0.4]))
    grid, middle, low, high = band([short, long], [True, True])
    assert grid.tolist() == [0, 2, 4]
    assert middle.tolist() == pytest.approx([0, 0.6, 0.7])  # at 2: (1 + 0.2)/2; at 4: (1 + 0.4)/2
    assert (low.tolist(), high.tolist()) == (pytest.approx([0, 0.2, 0.4]), [0, 1, 1])
    assert band([short, long], [False, True])[1].tolist() == pytest.approx([0, 0.6, 0.4])


def test_report_needs_no_torch_and_no_matplotlib_to_import() -> None:
    code = (
        "import sys, esr_train.report;"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
