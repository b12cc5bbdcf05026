from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from esr_train.cli import main
from esr_train.config import ConfigError, TrackingConfig, to_yaml
from esr_train.metrics import read_rows
from esr_train.tracking import Trackers, check_trackers
from tests.tiny import MakeConfig


def test_tensorboard_has_the_numbers_of_steps_and_evaluations(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, out = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(to_yaml(make_config(tracking__trackers=["tensorboard"])))
    assert main(["train", str(path), "--out", str(out)]) == 0
    run = out / "arms" / "train" / "seed0"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = read_rows(run / "metrics.jsonl")
    for key in ("loss", "eos_rate", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert logged == [(row["step"], pytest.approx(row[key])) for row in rows]
    assert len(events.Scalars("seconds/rollout")) == 3
    evals = read_rows(run / "evals.jsonl")
    logged = [(event.step, event.value) for event in events.Scalars("eval/greedy_accuracy")]
    assert logged == [
        (row["step"], pytest.approx(row["metrics"]["greedy_accuracy"])) for row in evals
    ]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else True)
    with pytest.raises(ConfigError, match="'wandb' needs a package .* pip install wandb"):
        check_trackers(TrackingConfig(trackers=["tensorboard", "wandb"]))


def test_nothing_is_imported_unless_asked_for(tmp_path: Path) -> None:
    Trackers(TrackingConfig(), tmp_path).log({"loss": 1.0}, 1)
    assert not any(tmp_path.iterdir())
    code = (
        "import sys, esr_train.cli; "
        "print([m for m in ('tensorboard', 'wandb', 'trackio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
