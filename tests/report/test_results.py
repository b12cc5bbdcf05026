"""Reading a run directory: order, spelling, and what is missing or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esr_train.config import ConfigError
from esr_train.report.results import read_run
from tests.report.runs import write_config


def test_arms_stand_from_short_to_long_and_the_baseline_last(tmp_path: Path) -> None:
    arms = [
        {"name": "whole"},
        {"name": "tail", "loss.window_tokens": 8},
        {"name": "a", "rollout.max_new_tokens": 8},
    ]
    report = {"metric": "kl", "threshold": 1.0}
    for order in (arms, arms[::-1]):
        write_config(tmp_path, {}, arms=order, report=report)
        assert [arm.name for arm in read_run(tmp_path).arms] == ["a", "tail", "whole"]
        write_config(tmp_path, {}, arms=order, report={**report, "baseline": "a"})
        assert [arm.name for arm in read_run(tmp_path).arms] == ["tail", "whole", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": []}, r"arms: got \[\], must be a list of"),
        ({"arms": [{"max_new_tokens": 3}]}, "arms: each needs a name"),
        ({"arms": [{"name": "a", "max_new_tokens": "x"}]}, "arm a: rollout.max_new_tokens"),
        ({"report": {"metric": 3}}, "report.metric: got 3"),
        ({"report": {"metric": "a", "threshold": "high"}}, "report.threshold: got 'high'"),
        ({"report": {"baseline": "hole"}}, "report.baseline: got 'hole', .*mean 'whole'"),
    ],
    ids=["no-arms", "no-name", "no-length", "no-metric", "no-threshold", "no-baseline"],
)
def test_unusable_config_names_the_file_and_the_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(tmp_path, {"whole": 100}, **changes)
    with pytest.raises(ConfigError, match=f"config.yaml: {message}"):
        read_run(tmp_path)
