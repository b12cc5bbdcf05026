from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from esr_train.config import (
    ConfigError,
    arm_config,
    config_from_dict,
    load_config,
    to_yaml,
    with_overrides,
)

MINIMAL = "student: {model: a}\nteacher: {model: b}\n"
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_used_and_overrides_win(path: Path) -> None:
    config = load_config(path, ["optim.lr=1e-4", "steps=7", "student.drop_layers=[1, 2]"])
    assert (config.optim.lr, config.steps, config.student.drop_layers) == (1e-4, 7, [1, 2])
    assert config.loss.divergence == "reverse_kl"
    assert config.student.model == "a"


@pytest.mark.parametrize("config_path", CONFIGS, ids=lambda p: p.stem)
def test_published_configs_load_and_survive_a_round_trip(config_path: Path, tmp_path: Path) -> None:
    config = load_config(config_path)
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.max_new_token=3",
            "unknown key 'rollout.max_new_token'.*'rollout.max_new_tokens'",
        ),
        ("lr=1", "unknown key 'lr'.*'optim.lr'"),
        ("optim.lr=fast", "optim.lr: got 'fast' of type str, expected float"),
        ("steps=2.5", "steps: got 2.5 of type float, expected int"),
        ("steps=true", "steps: got True of type bool, expected int"),
        ("loss.train_on_eos=1", "loss.train_on_eos: got 1 of type int, expected bool"),
        ("loss.window=start", "loss.window: got 'start', allowed are 'first', 'last'"),
        ("seeds=3", "seeds: got 3, expected a list"),
        ("seeds=[0, x]", r"seeds\[1\]: got 'x'"),
        ("seeds=[1, 1]", "seeds: .* must be different"),
        ("steps=0", "steps: got 0, must be above 0"),
        ("optim.lr=-1", "optim.lr: got -1.0, must be above 0"),
        ("rollout.temperature=-1", r"rollout.temperature: .* must be 0 \(greedy\) or a finite"),
        ("rollout.temperature=1e-9", r"rollout.temperature: .* must be 0 \(greedy\) or a finite"),
        ("optim={lr: 1, lr: 2}", "optim: 'lr' is given twice"),
        ("steps", "expected section.key=value"),
        ("loss.denominator=fixed", "loss.fixed_length: needed"),
        ("student.model=", "student.model"),
        ("optim=3", "optim: got 3, expected a mapping"),
        ("arms=[{max_new_tokens: 3}]", "arms: each needs a name"),
        ("arms=[{name: a/b}]", "arms: each needs a name that can be a directory"),
        ("arms=[{name: a}, {name: a}]", "'a' is used twice"),
        ("arms=[{name: a, max_tokens: 3}]", "arm a: unknown key 'max_tokens'"),
        ("arms=[{name: a, loss.window: start}]", "arm a: loss.window: got 'start'"),
    ],
)
def test_a_bad_value_names_the_key(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studnt: {model: a}", "unknown key 'studnt'; did you mean 'student'"),
        ("student: {modl: a}", "unknown key 'student.modl'; did you mean 'student.model'"),
        ("student: [a", "not valid YAML"),
        ("- a", "config: got .* expected a mapping"),
        ("teacher: {model: a}", "student.model: missing"),
    ],
)
def test_a_bad_file_is_told_in_one_message(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml is not a file"):
        load_config(tmp_path / "nowhere.yaml")


def test_null_only_where_the_type_allows_it(path: Path) -> None:
    assert load_config(path, ["loss.window_tokens=null"]).loss.window_tokens is None
    with pytest.raises(ConfigError, match="steps: got None"):
        load_config(path, ["steps=null"])


def test_an_arm_changes_only_what_it_names() -> None:
    config = config_from_dict({"student": {"model": "a"}, "teacher": {"model": "b"}})
    arm = {"name": "last-8", "max_new_tokens": 8, "loss.window": "last", "steps": 3}
    changed = arm_config(config, arm)
    assert changed == with_overrides(
        config, {"rollout.max_new_tokens": 8, "loss.window": "last", "steps": 3}
    )
    assert config.rollout.max_new_tokens == 100


def test_the_configuration_stays_small_and_explained() -> None:
    source = (Path(__file__).parent.parent / "esr_train" / "config.py").read_text()
    sections = [
        f.default_factory
        for f in dataclasses.fields(type(config_from_dict({})))
        if dataclasses.is_dataclass(f.default_factory)
    ]
    names = {(s, f.name) for s in sections for f in dataclasses.fields(s)}  # type: ignore[arg-type]
    plain = {"steps", "seeds", "arms"}
    assert len(names) + len(plain) <= 35
    for name in {n for _, n in names} | plain:
        line = next(t for t in source.splitlines() if t.startswith(f"    {name}: "))
        assert "  # " in line, f"{name} has no help"


def test_a_key_that_is_given_twice_is_an_error(path: Path) -> None:
    path.write_text(path.read_text() + "\nsteps: 3\nsteps: 4\n")
    with pytest.raises(ConfigError, match="'steps' is given twice"):
        load_config(path)
