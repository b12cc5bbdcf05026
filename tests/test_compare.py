from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from esr_train.arms import run_order
from esr_train.compare import Interrupted, compare
from esr_train.config import Config, ConfigError, with_overrides
from esr_train.metrics import read_rows
from esr_train.rollout import ContextError
from esr_train.train import Trainer
from tests.tiny import MakeConfig

ARMS = [
    {"name": "esr-3", "max_new_tokens": 3},
    {"name": "mask-3", "max_new_tokens": 9, "loss.window_tokens": 3, "steps": 2},
    {"name": "full", "max_new_tokens": 9},
]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> Config:
    return make_config(arms=ARMS, seeds=[0, 1], eval__every=3, report__baseline="full")


@pytest.fixture(scope="module")
def compared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(path of the report, what was said) of a comparison of all arms."""
    said: list[str] = []
    report = compare(config, tmp_path_factory.mktemp("compared") / "run", say=said.append)
    return report, said


def rows(run_dir: Path, arm: str, seed: int, name: str = "metrics") -> list[dict[str, Any]]:
    return read_rows(run_dir / "arms" / arm / f"seed{seed}" / f"{name}.jsonl")


def test_a_comparison_writes_everything(compared: tuple[Path, list[str]]) -> None:
    report, said = compared
    run_dir = report.parent
    assert re.match(r"6 runs, one at a time: up to \d+ (s|min), estimated", said[1])
    assert said[0] == "answers end by: '<eos>' (student); '<eos>' (teacher)"
    assert said[-1] == str(report) and "esr-3" in said[2] and "full" in said[2]
    assert report.name == "report.html" and report.stat().st_size > 10_000
    for name in ("report.md", "summary.json", "config.yaml", "environment.json"):
        assert (run_dir / name).is_file()
    assert list((run_dir / "figures").glob("*.png"))
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["torch"] and environment["jobs"] == environment["threads"] == 1
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["arms"] == ARMS
    for arm, steps in (("esr-3", 3), ("mask-3", 2), ("full", 3)):
        for seed in (0, 1):
            assert [row["step"] for row in rows(run_dir, arm, seed)] == list(range(1, steps + 1))
            assert [row["step"] for row in rows(run_dir, arm, seed, "evals")] == [0, steps]
            assert rows(run_dir, arm, seed, "samples")
    # The arms start equal: the same evaluation at step 0, and the same rollouts where N is equal.
    starts = [rows(run_dir, a["name"], s, "evals")[0]["metrics"] for a in ARMS for s in (0, 1)]
    assert all(start == starts[0] for start in starts)
    masked, full = (rows(run_dir, arm, 0)[0] for arm in ("mask-3", "full"))
    assert masked["tokens"] == full["tokens"] and masked["trained_tokens"] < full["trained_tokens"]
    # Shorter rollouts are beginnings of long ones: at the first step, mask and cut are one.
    assert rows(run_dir, "esr-3", 0)[0]["loss"] == pytest.approx(masked["loss"], rel=1e-4)
    assert rows(run_dir, "full", 0)[0]["loss"] != rows(run_dir, "full", 1)[0]["loss"]


def test_the_first_arm_rotates() -> None:
    assert run_order(["a", "b", "c"], [7, 8]) == [
        ("a", 7), ("b", 7), ("c", 7), ("b", 8), ("c", 8), ("a", 8),
    ]  # fmt: skip


def test_an_interrupt_leaves_the_finished_runs_and_says_so(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.step

    def step(self: Trainer, number: int, *rest: Any) -> dict[str, Any]:
        if "mask-3" in str(self.directory) and number == 2:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Interrupted, match=r"finished runs: esr-3 seed 0, of 6; their files"):
        compare(config, tmp_path)
    assert len(rows(tmp_path, "esr-3", 0)) == 3
    assert not (tmp_path / "report.html").exists()


def test_a_second_comparison_replaces_the_first_and_nothing_else(
    config: Config, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = with_overrides(config, {"arms": ARMS[::2], "seeds": [0]})
    compare(first, run_dir, max_steps=1, say=lambda text: None)
    (run_dir / "notes.txt").write_text("mine")
    second = with_overrides(config, {"arms": ARMS[1:], "seeds": [0]})
    compare(second, run_dir, max_steps=1, say=lambda text: None)
    assert sorted(p.name for p in (run_dir / "arms").iterdir()) == ["full", "mask-3"]
    assert (run_dir / "notes.txt").read_text() == "mine"
    # max_steps caps every arm, those with steps of their own included.
    assert [len(rows(run_dir, arm, 0)) for arm in ("full", "mask-3")] == [1, 1]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["arms"][0]["steps"] == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no earlier comparison"):
        compare(config, tmp_path / "other")


def test_an_arm_that_does_not_fit_is_refused_before_any_trains(
    config: Config, tmp_path: Path
) -> None:
    arms = [*ARMS, {"name": "huge", "max_new_tokens": 500}]
    with pytest.raises(ContextError, match="context overflow"):
        compare(with_overrides(config, {"arms": arms}), tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))
