from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

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


def test_only_the_same_comparison_goes_on_in_a_directory(config: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = with_overrides(config, {"arms": ARMS[::2], "seeds": [0]})
    compare(first, run_dir, max_steps=1, say=lambda text: None)
    (run_dir / "notes.txt").write_text("mine")
    second = with_overrides(config, {"arms": ARMS[1:], "seeds": [0]})
    with pytest.raises(ConfigError, match="another configuration: steps was 1, is 2; .*=never"):
        compare(second, run_dir, max_steps=2)
    changed = [{**ARMS[2], "max_new_tokens": 8}]
    with pytest.raises(ConfigError, match="another configuration: full.*was .*=never"):
        compare(with_overrides(first, {"arms": changed}), run_dir, max_steps=1)
    anew = with_overrides(second, {"checkpoint.resume": "never"})
    compare(anew, run_dir, max_steps=1, say=lambda text: None)
    assert sorted(p.name for p in (run_dir / "arms").iterdir()) == ["full", "mask-3"]
    assert (run_dir / "notes.txt").read_text() == "mine"
    # max_steps caps every arm, those with steps of their own included.
    assert [len(rows(run_dir, arm, 0)) for arm in ("full", "mask-3")] == [1, 1]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["arms"][0]["steps"] == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    for other in (config, anew):
        with pytest.raises(ConfigError, match="is not empty and holds no earlier comparison"):
            compare(other, tmp_path / "other")


def test_an_interrupted_comparison_goes_on_where_it_was(
    config: Config, compared: tuple[Path, list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    """Killed in the second step of the second run, which has a checkpoint of its first."""
    config = with_overrides(config, {"checkpoint.every": 1})
    trained: list[tuple[str, int]] = []
    real = Trainer.step

    def step(self: Trainer, number: int, *rest: Any) -> dict[str, Any]:
        run = str(self.directory.relative_to(tmp_path / "arms"))
        if run == "mask-3/seed0" and number == 2 and (run, 2) not in trained:
            trained.append((run, 2))
            raise SystemExit  # nothing is saved on the way out
        trained.append((run, number))
        return real(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "_save", _only_regular(Trainer._save))
    with pytest.raises(SystemExit):
        compare(config, tmp_path, say=lambda text: None)
    before = list(trained)
    said: list[str] = []
    compare(config, tmp_path, say=said.append)
    assert trained[len(before) :][:2] == [("mask-3/seed0", 2), ("full/seed0", 1)]
    assert said[1].startswith("5 runs, one at a time")
    for arm in ARMS:
        for seed in (0, 1):
            names = [arm["name"], seed]
            assert _curve(rows(tmp_path, *names)) == _curve(rows(compared[0].parent, *names))
    said.clear()
    compare(config, tmp_path, say=said.append)  # there is nothing left to do
    assert said[-1] == str(tmp_path / "report.html") and len(said) == 2


def _only_regular(save: Any) -> Any:
    def saved(self: Trainer) -> None:
        if sys.exc_info()[0] is None:
            save(self)

    return saved


def _curve(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_bytes")} for row in found]


@pytest.mark.parametrize("keep", [True, False])
def test_each_run_leaves_its_models_if_asked(config: Config, tmp_path: Path, keep: bool) -> None:
    changes = {"arms": ARMS[2:], "seeds": [0], "checkpoint.keep_models": keep}
    compare(with_overrides(config, changes), tmp_path, say=lambda text: None)
    left = tmp_path / "arms" / "full" / "seed0"
    assert not (left / "checkpoints").exists()
    for name in ("model", "best"):
        assert (left / name).is_dir() == keep
        if keep:
            AutoModelForCausalLM.from_pretrained(left / name)


def test_an_arm_that_does_not_fit_is_refused_before_any_trains(
    config: Config, tmp_path: Path
) -> None:
    arms = [*ARMS, {"name": "huge", "max_new_tokens": 500}]
    with pytest.raises(ContextError, match="context overflow"):
        compare(with_overrides(config, {"arms": arms}), tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))
