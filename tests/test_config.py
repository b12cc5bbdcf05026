from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from esr_train.config import (
    Config,
    ConfigError,
    LoraConfig,
    arm_config,
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
        ("rollout.max_new_token=3", "key 'rollout.max_new_token'.*'rollout.max_new_tokens'"),
        ("lr=1", "unknown key 'lr'.*'optim.lr'"),
        ("optim.lr=fast", "optim.lr: got 'fast', must be a valid number"),
        ("steps=2.5", "steps: got 2.5, must be a valid integer"),
        ("steps=true", "steps: got True, must be a valid integer"),
        ("loss.train_on_eos=1", "loss.train_on_eos: got 1, must be a valid boolean"),
        ("loss.window=start", "loss.window: .* must be 'first', 'last', 'middle', 'random'"),
        ("seeds=3", "seeds: got 3, must be a valid list"),
        ("seeds=[0, x]", r"seeds\[1\]: got 'x'"),
        ("seeds=[1, 1]", r"seeds: got \[1, 1\], must be different"),
        ("steps=0", "steps: got 0, must be greater than 0"),
        ("optim.betas=[0.9]", "optim.betas: .*at least 2 items"),
        ("optim.betas=[0.9, 1.0]", "optim.betas.1.: got 1.0, must be less than 1"),
        ("optim.lr=-1", "optim.lr: got -1, must be greater than 0"),
        ("optim.lr=.inf", "optim.lr: got inf, must be a finite number"),
        ("eval.every=-1", "eval.every: got -1, must be greater than or equal to 0"),
        ("runtime.liger=auto", "runtime.liger: got 'auto', must be a valid boolean"),
        ("rollout.temperature=-1", r"rollout.temperature: .* must be 0 \(greedy\) or a finite"),
        ("rollout.temperature=1e-9", r"rollout.temperature: .* must be 0 \(greedy\) or a finite"),
        ("rollout.top_k=-1", "rollout.top_k: got -1, must be greater than or equal to 0"),
        ("rollout.top_p=0", "rollout.top_p: got 0, must be greater than 0"),
        ("rollout.min_p=1.5", "rollout.min_p: got 1.5, must be less than or equal to 1"),
        ("rollout.max_tokens_in_flight=0", "rollout.max_tokens_in_flight: got 0, must be greater"),
        ("optim={lr: 1, lr: 2}", "optim: 'lr' is given twice"),
        ("steps", "expected section.key=value"),
        ("loss.denominator=fixed", "loss.fixed_length: got None, must be a number of tokens"),
        ("loss.window=selected", r"loss.select_by: got \[\], must name a signal"),
        ("loss.select_by=[divergence]", r"loss.select_by: got \['divergence'\], must name .* none"),
        ("loss={window: selected, select_by: [divergence]}", "loss.window_tokens: got None, must"),
        (
            "loss={divergence: cross_entropy, merge_terminators: true}",
            "loss.merge_terminators: got",
        ),
        ("loss.divergence=cross_entropy", "rollout.source: got 'student', must be 'teacher'"),
        ("rollout.grow_from=101", "rollout.grow_from: got 101, must be at most .* 100"),
        ("rollout={grow_from: 1, source: teacher}", "rollout.grow_from: got 1, must be null"),
        ("tune.rates=[1.0, 1.0]", r"tune.rates: got \[1.0, 1.0\], must be different"),
        ("tune={rates: [1.0], seeds: [0]}", r"tune.seeds: got \[0\], of which \[0\] are in seeds"),
        ("student.model=null", "student.model: got None, must be a valid string"),
        ("teacher.url=", "override: got 'teacher.url=', without a value; null is written null"),
        ("student.model=''", "student.model: got '', must have at least 1 character"),
        ("optim=3", "optim: got 3, must be a mapping"),
        ("optim={lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'"),
        ("arms=[3]", r"arms\[0\]: got 3, must be a mapping"),
        ("arms=[{max_new_tokens: 3}]", "arms: each needs a name"),
        ("arms=[{name: a/b}]", "arms: each needs a name that can be a directory"),
        ("arms=[{name: a}, {name: a}]", "'a' is used twice"),
        ("arms=[{name: a, max_tokens: 3}]", "arm a: unknown key 'max_tokens'"),
        ("arms=[{name: a, loss.window: start}]", "arm a: loss.window: got 'start'"),
        ("report.baseline=full", "report.baseline: got 'full', .*null without arms"),
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
        ("- a", r"config: got \['a'\], must be a mapping"),
        ("teacher: {model: a}", "student.model: missing; give builtin:NAME"),
        ("student: {}\nteacher: {model: a}", "student.model: missing; give builtin:NAME"),
        (f"{MINIMAL}optim:", "optim: got None, must be a mapping"),
        (f"{MINIMAL}1: 2", "unknown key '1'"),
        (f"{MINIMAL}steps: 3\nsteps: 4\n", "'steps' is given twice"),
        (
            f"{MINIMAL}arms: [{{name: full}}, {{name: b}}]\nreport: {{baseline: ful}}",
            r"report.baseline: got 'ful', .* \('full', 'b'\); did you mean 'full'",
        ),
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
    config = Config.model_validate({"student": {"model": "a"}, "teacher": {"model": "b"}})
    arm = {"name": "last-8", "max_new_tokens": 8, "loss.window": "last", "steps": 3}
    changed = arm_config(config, arm)
    assert changed == with_overrides(
        config, {"rollout.max_new_tokens": 8, "loss.window": "last", "steps": 3}
    )
    assert config.rollout.max_new_tokens == 100


def test_an_arm_may_be_the_baseline(path: Path) -> None:
    config = load_config(path, ["arms=[{name: a, steps: 3}, {name: b}]", "report.baseline=b"])
    assert config.report.baseline == "b"
    assert arm_config(config, config.arms[0]).steps == 3


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.5E+2", 150.0), ("3", 3.0)])
def test_a_float_needs_no_dot(path: Path, text: str, value: float) -> None:
    lr = load_config(path, [f"optim.lr={text}"]).optim.lr
    assert lr == value and isinstance(lr, float)


def test_overrides_complete_a_section_of_the_file(path: Path) -> None:
    path.write_text("student: {drop_layers: [1]}\nteacher: {model: b}\n")
    config = load_config(path, ["student.model=a"])
    assert (config.student.model, config.student.drop_layers) == ("a", [1])


@pytest.mark.parametrize(
    ("section", "key", "value", "nothing"),
    [
        ("student", "drop_layers", [1, 2], "[]"),
        ("teacher", "drop_layers", [1, 2], "[]"),
        ("teacher", "adapter", "adapters/x", "null"),
    ],
)
def test_what_belongs_to_a_model_is_refused_with_another(
    path: Path, section: str, key: str, value: Any, nothing: str
) -> None:
    config = {"student": {"model": "a"}, "teacher": {"model": "b"}}
    model = config[section]["model"]
    path.write_text(yaml.safe_dump({**config, section: {"model": model, key: value}}))
    advice = re.escape(f"{section}.{key}={nothing} for none")
    with pytest.raises(ConfigError, match=f"is for {model}; with {section}.model=c .*{advice}"):
        load_config(path, [f"{section}.model=c"])
    assert getattr(getattr(load_config(path), section), key) == value
    given = f"{section}.{key}={value}"
    for overrides in ([f"{section}.model={model}"], [f"{section}.model=c", given]):
        assert getattr(getattr(load_config(path, overrides), section), key) == value
    changed = load_config(path, [f"{section}.model=c", f"{section}.{key}={nothing}"])
    assert not getattr(getattr(changed, section), key)


def test_keys_of_a_section_in_a_section_are_known(path: Path) -> None:
    config = load_config(path, ["student.lora.r=8", "student.lora.dropout=0.1"])
    assert config.student.lora == LoraConfig(r=8, dropout=0.1)
    assert load_config(path, ["student.lora={}"]).student.lora == LoraConfig()
    for override, message in (
        ("student.lora.rank=8", "unknown key 'student.lora.rank'; did you mean 'student.lora.r'"),
        ("student.lora.dropout=1.0", "student.lora.dropout: got 1.0, must be less than 1"),
        ("student.lora={ranks: 8}", "unknown key 'student.lora.ranks'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, [override])


@pytest.mark.parametrize("key", ["student.model", "teacher.model", "runtime.dtype", "student"])
def test_arms_share_their_models(path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"arm a: {key} cannot differ between arms"):
        load_config(path, [f"arms=[{{name: a, {key}: x}}]"])


def test_the_configuration_stays_small_and_explained() -> None:
    source = (Path(__file__).parent.parent / "esr_train" / "config" / "sections.py").read_text()
    fields = {name: field.annotation for name, field in Config.model_fields.items()}
    sections = [hint.model_fields for hint in fields.values() if hasattr(hint, "model_fields")]
    names = [name for section in sections for name in section]
    names += ["steps", "seeds", "arms"]
    assert len(names) <= 92  # what a server or a placement of the teacher takes is in it
    for name in names:
        before, line = re.search(rf"(.*)\n    {name}: (.*)", source).groups()
        assert "  # " in line or before.startswith("    # "), f"{name} has no help"


@pytest.mark.parametrize("name", ["esr_train.config", "esr_train.report"])
def test_a_quick_command_imports_nothing_slow(name: str) -> None:
    slow = {"torch", "transformers", "matplotlib"}
    code = f"import sys, {name}; print({slow} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
