"""The report: numbers worked out by hand, and runs that are incomplete, broken or hostile."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from esr_train.figures import band, draw_pictures
from esr_train.headline import headline, verdicts
from esr_train.report import summary_table, write_report
from esr_train.results import ArmSummary, Run, read_run, summarise

MIB = 2**20
FIGURES = ["metric_seconds", "metric_tokens", "metric_steps", "divergence", "length_eos"]
FIGURES += ["phase_seconds", "peak_memory"]


def write_config(folder: Path, lengths: dict[str, int], seeds: int = 1, **changes: Any) -> None:
    """config.yaml and environment.json of a run with {arm: max_new_tokens}."""
    config: dict[str, Any] = {
        "rollout": {"task": "sums", "max_new_tokens": 100},
        "report": {"metric": "greedy_accuracy", "threshold": 0.9, "higher_is_better": True},
        "steps": 20,
        "seeds": list(range(seeds)),
        "arms": [{"name": name, "max_new_tokens": length} for name, length in lengths.items()],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    environment = {"cpu": "8-core test CPU", "torch": "2.13", "threads": 2, "commit": "abc123"}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")


def write_seed(
    folder: Path,
    arm: str,
    seed: int,
    evals: list[tuple[float, float, float, float | None]],
    *,
    step_seconds: float = 1.0,
    peak: int | None = 100 * MIB,
    tokens: int = 100,
    samples: list[dict[str, Any]] | None = None,
    extra: Callable[[float], dict[str, float]] = lambda step: {},
) -> Path:
    """Logs of a seed; evals are (step, train_seconds, tokens, greedy_accuracy)."""
    target = folder / "arms" / arm / f"seed{seed}"
    target.mkdir(parents=True, exist_ok=True)
    shares = {"rollout": 0.7, "teacher": 0.1, "student": 0.2}
    peaks = {"rollout": 0.5, "teacher": 0.7, "student": 1.0}
    metrics = [
        {
            "step": step,
            "divergence": 2.0 * math.exp(-step / 8)
            + 20 / tokens
            + 0.05 * math.sin(9 * step + seed),
            "response_length": tokens / 64 * (0.9 + 0.1 * math.cos(step + seed)),
            "eos_rate": min(1.0, tokens / 2e4 + step / 400),
            "tokens": tokens,
            "seconds": {name: share * step_seconds for name, share in shares.items()},
            "peak_bytes": {k: None if peak is None else int(v * peak) for k, v in peaks.items()},
        }
        for step in range(1, int(evals[-1][0]) + 1 if evals else 4)
    ]
    rows = [
        {
            "step": step,
            "train_seconds": seconds,
            "tokens": count,
            "metrics": {"greedy_accuracy": value, **extra(step)},
        }
        for step, seconds, count, value in evals
    ]
    write_rows(target / "metrics.jsonl", metrics)
    write_rows(target / "evals.jsonl", rows)
    write_rows(target / "samples.jsonl", samples or [])
    return target


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def by_hand(folder: Path) -> Run:
    """Three seeds of two arms, small enough to do in one's head (see the tests)."""
    write_config(folder, {"full": 100, "esr-10": 10}, seeds=3)
    for seed, late in enumerate([40.0, 60.0, 80.0]):
        evals = [(0, 0, 0, 0.1), (10, late / 2, 1000, 0.8), (20, late, 2000, 0.9 + seed / 100)]
        write_seed(folder, "full", seed, evals, step_seconds=2.0, peak=300 * MIB, tokens=100)
    for seed, late in enumerate([10.0, 20.0, 16.0]):
        evals = [(0, 0, 0, 0.1), (10, late / 2, 100, 0.95 if seed == 2 else 0.5)]
        evals.append((20, late, 200, 0.92 if seed < 2 else 0.88))
        write_seed(folder, "esr-10", seed, evals, step_seconds=0.5, peak=200 * MIB, tokens=10)
    return read_run(folder)


def summaries_of(run: Run) -> dict[str, ArmSummary]:
    return {item.name: item for item in summarise(run)}


def realistic(folder: Path, seeds: int = 3) -> None:
    """A run with noisy curves, as a comparison writes it; also what the figures are judged by."""
    lengths = {"full": 256, "esr-16": 16, "esr-64": 64, "esr-8": 8}
    write_config(folder, lengths, seeds=seeds, steps=60)
    for name, length in lengths.items():
        for seed in range(seeds):
            noise = np.random.default_rng([length, seed])
            ceiling = {8: 0.62, 16: 0.95, 64: 0.99, 256: 0.99}[length]
            evals, seconds = [], 0.1 + 0.011 * length
            for step in range(0, 61, 5):
                gain = 1 - math.exp(-step / (10 + 6 * noise.random()))
                value = 0.07 + (ceiling - 0.07) * gain
                value -= 0.006 * max(0, step - 30) * (length == 8)
                evals.append((step, step * seconds, step * 64 * length, round(value, 3)))
            write_seed(
                folder, name, seed, evals, step_seconds=seconds * (1 + 0.05 * seed),
                peak=int((400 + 2.5 * length) * MIB), tokens=64 * length,
                samples=[
                    {"step": s, "prompt": "12+34+56+78=", "response": f"12+34=46;{s}", "score": 1.0}
                    for s in (0, 30, 60)
                ],
                extra=lambda step: {"sampled_accuracy": step / 70, "heldout_kl": 2 / (1 + step)},
            )  # fmt: skip


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


def test_headline_states_ratios_spread_and_seeds(tmp_path: Path) -> None:
    run = by_hand(tmp_path)
    text = headline(run, summarise(run))
    assert "6.0 times faster than full to greedy accuracy 0.9 (10 s against 60 s" in text
    assert "10.0 times fewer generated tokens" in text
    assert "1.50 times lower peak memory" in text
    assert "median of 3 seeds, full's time over esr-10's from 3.0 to 10.0" in text


def test_headline_says_slower_where_the_short_arm_loses(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    write_seed(tmp_path, "full", 0, [(0, 0, 0, 0.1), (20, 10, 2000, 0.95)], peak=100 * MIB)
    write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 40, 4000, 0.95)], peak=200 * MIB)
    run = read_run(tmp_path)
    text = headline(run, summarise(run))
    assert "4.0 times slower than full" in text
    assert "2.0 times more generated tokens" in text
    assert "as many steps" in text
    assert "2.0 times higher peak memory" in text
    assert "1 seed" in text


@pytest.mark.parametrize(
    ("short", "full", "expected"),
    [
        (
            0.5,
            0.95,
            "esr-10 does not reach greedy accuracy 0.9 (best 0.500, final 0.500); full does",
        ),
        (0.95, 0.5, "full does not (best 0.500, final 0.500)"),
        (
            0.5,
            0.6,
            "Neither esr-10 (best 0.500, final 0.500) nor full (best 0.600, final 0.600) reaches",
        ),
    ],
    ids=["only-full", "only-short", "neither"],
)
def test_headline_says_plainly_who_misses_the_threshold(
    tmp_path: Path, short: float, full: float, expected: str
) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    for name, value in (("esr-10", short), ("full", full)):
        write_seed(tmp_path, name, 0, [(0, 0, 0, 0.1), (20, 5, 50, value)])
    run = read_run(tmp_path)
    assert expected in headline(run, summarise(run))


def test_threshold_met_before_training_gives_no_ratio(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100})
    for name in ("esr-10", "full"):
        write_seed(tmp_path, name, 0, [(0, 0, 0, 0.93), (20, 5, 50, 0.95)])
    run = read_run(tmp_path)
    assert math.isnan(summaries_of(run)["esr-10"].ratios["seconds"].middle)
    assert "before any training" in headline(run, summarise(run))


def test_seed_that_misses_counts_as_infinite_in_the_median(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10, "full": 100}, seeds=3)
    for seed, values in enumerate([(0.95, 0.95), (0.95, 0.2), (0.2, 0.2)]):
        for name, value in zip(("full", "esr-10"), values, strict=True):
            write_seed(tmp_path, name, seed, [(0, 0, 0, 0.1), (20, 10 + seed, 50, value)])
    arms = summaries_of(read_run(tmp_path))
    assert (arms["full"].to_threshold["seconds"], arms["full"].reached) == (11, 2)
    assert (arms["esr-10"].to_threshold["seconds"], arms["esr-10"].reached) == (math.inf, 1)
    assert "2 of 3" in summary_table(tmp_path)


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
