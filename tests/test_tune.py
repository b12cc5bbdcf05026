"""`compare --tune`: the choice by hand, and a whole tuned comparison of tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esr_train.cli import main
from esr_train.compare import compare
from esr_train.config import (
    Config,
    ConfigError,
    EvalConfig,
    arm_config,
    load_config,
    to_yaml,
    with_overrides,
)
from esr_train.evaluate import heldout_problems
from esr_train.metrics import read_rows
from esr_train.report.results import read_run
from esr_train.report.tuning import chosen, grid_name, not_tuned, read_tuning, settings_of
from esr_train.tasks import Problem
from esr_train.tasks.sums import SumsTask
from esr_train.train import Trainer
from esr_train.tune import tune
from tests.report.runs import write_config, write_seed
from tests.tiny import MakeConfig

ROOT = Path(__file__).parents[1]
RATES = [0.1, 0.2, 0.4, 0.8]


def grid(folder: Path, curves: dict[float, list[list[float]]], **report: Any) -> dict[str, Any]:
    """What is chosen for one arm from a curve for each rate and seed, evaluated every 10 steps."""
    known = {"metric": "greedy_accuracy", "threshold": 0.9, **report}
    spec = {"name": "esr", "tune.rates": list(curves)}
    arms = [{"name": grid_name("esr", rate), "max_new_tokens": 10} for rate in curves]
    seeds = max(map(len, curves.values()))
    write_config(folder, {}, seeds, arms=arms, report=known)
    for rate, of_rate in curves.items():
        for seed, values in enumerate(of_rate):
            evals = [(10 * i, float(i), i, value) for i, value in enumerate(values)]
            write_seed(folder, grid_name("esr", rate), seed, evals)
    run = read_run(folder)
    return chosen(run, with_overrides(run.config, {"arms": [spec]}))["arms"]["esr"]


LOW, GOOD = [0.1, 0.2, 0.5], [0.1, 0.5, 0.9]


@pytest.mark.parametrize(
    ("curves", "rate", "note"),
    [
        # The best end of stable rates: 0.8 has lost more than a tenth of its gain of 0.9.
        ({0.1: [LOW], 0.2: [GOOD], 0.8: [[0.1, 1.0, 0.9]]}, 0.2, None),
        # 0.2 and 0.4 end alike, within a twentieth of the gain; 0.4 is there sooner.
        (
            {0.1: [LOW], 0.2: [GOOD], 0.4: [[0.1, 0.8, 0.87]], 0.8: [[0.1] * 3]},
            0.4,
            None,
        ),
        # ... but 0.85 is further from 0.9 than that.
        (
            {0.1: [LOW], 0.2: [GOOD], 0.4: [[0.1, 0.8, 0.85]], 0.8: [[0.1] * 3]},
            0.2,
            None,
        ),
        ({0.1: [GOOD], 0.2: [GOOD]}, 0.1, "the lowest rate of the grid"),
        ({0.1: [LOW], 0.2: [GOOD]}, 0.2, "the highest rate of the grid"),
        # One seed of two falls.
        ({0.1: [GOOD, [0.1, 0.2, 0.3]], 0.2: [GOOD, [0.1, 0.9, 0.05]]}, 0.1, "the lowest"),
        # A run that stopped at step 10 of 20.
        ({0.1: [[0.1, 0.2, 0.3]], 0.2: [[0.1, 0.9]]}, 0.1, "the lowest"),
        ({0.1: [[0.1, 0.2, 0.05]], 0.2: [[0.1, 0.9, 0.0]]}, 0.1, "no rate of the grid is stable"),
    ],
)
def test_the_rule_by_hand(tmp_path: Path, curves: Any, rate: float, note: str | None) -> None:
    found = grid(tmp_path, curves)
    assert found["chosen"] == rate
    assert found["note"] is None if note is None else found["note"].startswith(note)
    assert [each["rate"] for each in found["rates"]] == list(curves)


def test_the_rule_where_lower_is_better(tmp_path: Path) -> None:
    curves = {0.1: [[2.0, 1.5, 1.0]], 0.2: [[2.0, 1.0, 0.5]], 0.4: [[2.0, 0.2, 1.5]]}
    found = grid(tmp_path, curves, higher_is_better=False)
    assert found["chosen"] == 0.2
    assert found["rates"][2]["unstable"] == "keeps 0.28 of its gain"


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    return make_config(
        arms=[
            {"name": "esr-3", "max_new_tokens": 3, "tune.rates": [0.001, 0.01]},
            {"name": "mask-3", "max_new_tokens": 6, "loss.window_tokens": 3},
            {"name": "full", "max_new_tokens": 6},
        ],
        tune={"rates": [0.002], "seeds": [7]},
        eval__every=3,
        eval__problems=5,
        report={"metric": "heldout_kl", "threshold": 5.0, "higher_is_better": False,
                "baseline": "full"},
    )  # fmt: skip


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to write no more of them: their figures take most of the time."""
    return lambda: monkeypatch.setattr("esr_train.compare.write_report", lambda run_dir: run_dir)


def test_a_tuned_comparison_from_end_to_end(
    config: Config, tmp_path: Path, without_reports: Callable[[], None]
) -> None:
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(to_yaml(config))
    assert main(["compare", str(path), "--tune", "--jobs", "1", "--out", str(out)]) == 0
    tuning = read_tuning(out)
    assert tuning is not None and tuning["seeds"] == [7]
    rates = {name: arm["chosen"] for name, arm in tuning["arms"].items()}
    assert rates["esr-3"] in (0.001, 0.01) and rates["full"] == rates["mask-3"] == 0.002
    trained = {arm.name: arm.config.optim.lr for arm in read_run(out).arms}
    assert trained == rates and not_tuned(read_run(out)) is None
    for name, rate in rates.items():
        rows = read_rows(out / "arms" / name / "seed0" / "metrics.jsonl")
        assert rows[-1]["lr"] == rate  # past the warm-up of two steps
    # The grid was trained on its own seed, and evaluated on problems that the test has not.
    grid_config = load_config(out / "tuning" / "config.yaml")
    assert grid_config.seeds == [7] and grid_config.eval.validation
    assert len(grid_config.arms) == 4 and not list((out / "tuning").rglob("model"))
    report = (out / "report.md").read_text()
    assert "Learning rates, on validation seeds 7" in report
    assert report.count("chosen") >= 3 and "No headline ratio: 1 seed of both arms" in report

    # Nothing is trained twice; a choice made there holds for the same settings elsewhere.
    without_reports()
    before = (out / "tuning" / "arms" / "esr-3@0.01" / "seed7" / "metrics.jsonl").stat().st_mtime_ns
    assert tune(config, out, say=lambda text: None) == load_config(out / "config.yaml")
    grown = out / "tuning" / "arms" / "esr-3@0.01" / "seed7" / "metrics.jsonl"
    assert grown.stat().st_mtime_ns == before
    arms = [{**arm, "optim.lr": rates[arm["name"]]} for arm in config.arms]
    later = with_overrides(config, {"arms": arms, "tune.chosen_in": str(out), "tune.rates": []})
    other = tmp_path / "other"
    compare(later, other, say=lambda text: None)
    assert not_tuned(read_run(other)) is None
    for changes, reason in (
        ({"optim.warmup_steps": 1}, "chosen for other settings of optim"),
        ({"arms": [{**arm, "optim.lr": 0.5} for arm in arms]}, "trained at .* 0.5, and 0.0"),
        ({"seeds": [7], "tune.seeds": [8]}, r"chosen on seeds that are reported, \[7\]"),
    ):
        changed = with_overrides(later, changes)
        (other / "config.yaml").write_text(to_yaml(changed))
        found = not_tuned(read_run(other))
        assert found is not None and re.search(reason, found)
    (other / "tuning.json").unlink()
    assert str(not_tuned(read_run(other))).startswith("no learning rate was chosen per arm")
    with pytest.raises(ConfigError, match="tune.chosen_in: got .*which has no tuning.json"):
        compare(with_overrides(later, {"tune.chosen_in": str(tmp_path)}), tmp_path / "third")


def test_a_grid_needs_rates_and_evaluations(config: Config, tmp_path: Path) -> None:
    for changes, message in (
        ({"eval.every": 0}, "eval.every: got 0"),
        ({"tune.rates": []}, "tune.rates: got .*for the arm 'mask-3'"),
    ):
        with pytest.raises(ConfigError, match=message):
            tune(with_overrides(config, changes), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"tune.seeds: got \[\], must be at least one"):
        with_overrides(config, {"tune.seeds": []})
    assert not (tmp_path / "run").exists()


def test_a_rate_at_which_training_breaks_down_is_not_chosen(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_reports: Callable[[], None],
) -> None:
    without_reports()
    real = Trainer._gradient

    def gradient(self: Trainer, step: int, *rest: Any) -> dict[str, float]:
        sums = real(self, step, *rest)
        broken = self.config.optim.lr == 0.01 and step == 2
        return {**sums, "loss": float("nan")} if broken else sums

    monkeypatch.setattr(Trainer, "_gradient", gradient)
    tuned = tune(config, tmp_path, say=lambda text: None)
    assert tuned.arms[0]["optim.lr"] == 0.001
    found = json.loads((tmp_path / "tuning.json").read_text())["arms"]["esr-3"]["rates"]
    assert [rate["unstable"] for rate in found] == [None, "did not train to the end"]


class Few:
    """A task with ten held-out problems."""

    name = "few"

    def count(self, split: str) -> int:
        return 10

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        assert count <= 10
        return [Problem(f"{i}=", "0") for i in range(count)]

    def score(self, problem: Problem, response: str) -> None:
        return None


def test_a_rate_is_chosen_on_other_problems_than_the_tests() -> None:
    for task, count, others in ((SumsTask(), 20, 20), (Few(), 4, 4), (Few(), 7, 3)):
        test, validation = (
            heldout_problems(task, EvalConfig(problems=count, validation=flag))
            for flag in (False, True)
        )
        prompts = {problem.prompt for problem in test}
        assert len(test) == count and len(validation) == others
        assert not prompts & {problem.prompt for problem in validation}
    with pytest.raises(ConfigError, match="eval.problems: got 10, all of the held-out ones"):
        heldout_problems(Few(), EvalConfig(problems=10, validation=True))


def test_the_demo_trains_at_the_rates_that_were_chosen_for_it() -> None:
    config = load_config(ROOT / "configs" / "demo.yaml")
    assert config.tune.chosen_in == "docs/demo"  # where `make demo` runs
    tuning = read_tuning(ROOT / "docs" / "demo")
    assert tuning is not None and not {*tuning["seeds"]} & {*config.seeds}
    for arm in config.arms:
        own, choice = arm_config(config, arm), tuning["arms"][arm["name"]]
        assert own.optim.lr == choice["chosen"]
        assert settings_of(own) == settings_of(Config.model_validate(choice["settings"]))
