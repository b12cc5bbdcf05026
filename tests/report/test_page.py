"""The report as written: complete, incomplete, broken and hostile runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from esr_train.report import summary_table, write_report
from esr_train.report.headline import verdicts
from esr_train.report.results import read_run
from esr_train.report.summary import summarise
from tests.report.runs import (
    by_hand,
    realistic,
    set_baseline,
    summaries_of,
    write_arms,
    write_config,
    write_seed,
)

FIGURES = ["metric_seconds", "metric_tokens", "metric_steps", "divergence", "length_eos"]
FIGURES += ["phase_seconds", "peak_memory"]


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


@pytest.mark.parametrize("baseline", [None, "train"])
def test_single_arm_is_reported_without_a_comparison(tmp_path: Path, baseline: str | None) -> None:
    write_config(tmp_path, {"train": 100})
    set_baseline(tmp_path, baseline)
    write_seed(tmp_path, "train", 0, [(0, 0, 0, 0.1), (20, 9, 90, 0.9)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "train reaches greedy accuracy 0.9 after 9 s" in page
    for text in ("against train<", "All arms", "report.baseline names", "(1.00x)", "four times"):
        assert text not in re.sub(r"base64,[^\"]+", "", page)


def test_several_arms_without_a_baseline_are_reported_without_ratios(tmp_path: Path) -> None:
    by_hand(tmp_path)
    set_baseline(tmp_path, None)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown, " ".join(summary_table(tmp_path).split())):
        assert "report.baseline names no arm" in text
        assert not re.search(r"\(\d[\d.]*x\)", text) and "against full" not in text
    assert json.loads((tmp_path / "summary.json").read_text())["baseline"] is None


def test_null_and_nan_metrics_are_skipped(tmp_path: Path) -> None:
    evals = [(10, 5, 50, None), (15, 6, 60, math.nan), (20, 9, 90, 0.9)]
    arm = summaries_of(write_arms(tmp_path, {"esr-10": evals, "full": evals}, peak=None))["full"]
    assert (arm.to_threshold["seconds"], arm.final.middle) == (9, 0.9)
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


def test_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    for call in (write_report, summary_table):
        with pytest.raises(FileNotFoundError, match=r"run directory .*nowhere: no config.yaml"):
            call(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_samples_are_escaped_and_text_that_breaks_files_is_replaced(tmp_path: Path) -> None:
    nasty = "<script>alert(1)</script> & ```` \x00 \ud800 $\\frac{$"
    samples = [{"step": 0, "prompt": nasty, "response": nasty}]
    evals = [(20, 5, 50, 0.95)]
    write_arms(tmp_path, {"<b>$x$": evals, "full": evals}, samples=samples)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "<b>$x$" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; ```` \ufffd \ufffd" in page
    assert "`````\n<script>" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_markdown_has_one_blank_line_between_blocks(tmp_path: Path) -> None:
    """Also where a list of notes, verdicts, figures or samples is empty."""
    realistic(tmp_path / "whole", seeds=1)
    write_config(tmp_path / "empty", {"esr-10": 10, "full": 100})
    for run_dir in (tmp_path / "whole", tmp_path / "empty"):
        write_report(run_dir)
        lines = (run_dir / "report.md").read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            if line.startswith(("#", "![", "**")):
                assert i == 0 or not lines[i - 1] and lines[i - 2], line
                assert not lines[i + 1] and lines[i + 2], line


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
    costs = r".*\(0 to {}\) +\S+ \(0 to 20\)\n"
    assert re.search(costs.format("87,654,321") + costs.format("987,654,321"), table)
    assert "80.00 GiB" in table and "1.00 GiB (80.0x)" in table
