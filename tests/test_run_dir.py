from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from esr_train.config import Config, ConfigError, to_yaml, with_overrides
from esr_train.run_dir import check_comparison, check_continues

ARMS = [{"name": "esr", "max_new_tokens": 3}, {"name": "full"}]
CONFIG = Config.model_validate(
    {"student": {"model": "a"}, "teacher": {"model": "b"}, "arms": ARMS, "steps": 7}
)


def _without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Settings as an earlier version wrote them, which did not have `keys`."""
    for key in keys:
        section, _, name = key.rpartition(".")
        del (settings[section] if section else settings)[name]
    return settings


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    settings = _without(
        yaml.safe_load(to_yaml(CONFIG)), "loss.window", "optim.schedule", "tracking"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_a_key_that_is_new_since_then_has_its_default(earlier: Path) -> None:
    check_continues(earlier, CONFIG)
    check_comparison(earlier, CONFIG, anew=False)
    changed = with_overrides(CONFIG, {"loss.window": "last"})
    for check in (check_continues, lambda *given: check_comparison(*given, anew=False)):
        with pytest.raises(ConfigError, match="configuration: loss.window was first, is last"):
            check(earlier, changed)


def test_models_may_be_in_parts_or_elsewhere_than_before(earlier: Path) -> None:
    for key, value in {"teacher.placement": "cpu", "runtime.fsdp": True}.items():
        check_continues(earlier, with_overrides(CONFIG, {key: value}))


def test_arms_are_the_same_by_what_they_mean(earlier: Path) -> None:
    said = [ARMS[0], {"name": "full", "loss.window": "first", "rollout.max_new_tokens": 100}]
    check_comparison(earlier, with_overrides(CONFIG, {"arms": said}), anew=False)
    other = with_overrides(CONFIG, {"arms": [{**ARMS[0], "loss.window": "last"}, ARMS[1]]})
    with pytest.raises(ConfigError, match="another configuration: esr.*was .*resume=never"):
        check_comparison(earlier, other, anew=False)
    check_comparison(earlier, other, anew=True)


def test_a_configuration_of_another_version_that_cannot_be_read_is_named(earlier: Path) -> None:
    settings = yaml.safe_load((earlier / "config.yaml").read_text())
    settings["loss"]["gone"] = 3
    (earlier / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match="earlier run there, cannot be used: unknown key 'loss.g"):
        check_continues(earlier, CONFIG)
    check_comparison(earlier, CONFIG, anew=True)
