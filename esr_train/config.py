"""The configuration: nested dataclasses from YAML plus dotted overrides, strict in keys and types.

    config = load_config(Path("configs/demo.yaml"), ["optim.lr=1e-4", "steps=20"])

An unknown key is an error that names the nearest known one; a value of the wrong type is an error
that names the key, the value and the type. `null` is allowed only where the type says `| None`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what is allowed."""


@dataclass(frozen=True)
class ModelConfig:
    model: str = ""  # builtin:NAME, smollm2, a Hugging Face hub id, or a local directory
    drop_layers: list[int] = field(default_factory=list)  # decoder layers to remove after loading


@dataclass(frozen=True)
class RuntimeConfig:
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bf16 on CUDA, else fp32
    attention: str = "auto"  # auto: flash_attention_2 on CUDA where installed, else sdpa
    liger: Literal["auto", "off"] = "auto"  # auto: its layers on CUDA where installed
    trust_remote_code: bool = False  # run model code that comes with a hub repository


@dataclass(frozen=True)
class RolloutConfig:
    task: str = "sums"  # sums, prompts, or prompts:PATH.txt
    prompts: int = 16  # prompts per step
    samples: int = 1  # responses sampled per prompt
    max_new_tokens: int = 100  # N: response tokens sampled and trained on, EOS included
    temperature: float = 1.0  # of the sampling; 0 = greedy


@dataclass(frozen=True)
class LossConfig:
    divergence: str = "reverse_kl"  # reverse_kl, forward_kl, jsd
    denominator: Literal["token", "trajectory", "fixed"] = "token"  # what the sum is divided by
    fixed_length: int | None = None  # "fixed" divides by responses x fixed_length
    window: Literal["first", "last", "middle", "random"] = "first"  # part that is trained on
    window_tokens: int | None = None  # length of the window; null = the whole response
    temperature: float = 1.0  # both models' logits are divided by this
    train_on_eos: bool = True  # the EOS token is part of the answer
    impl: Literal["auto", "torch", "triton", "reference"] = "auto"  # reference = plain PyTorch


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 1e-5  # AdamW, peak learning rate
    warmup_steps: int = 0  # linear, from lr / warmup_steps
    schedule: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine ends at 0
    micro_batch: int | None = None  # responses per forward and backward; null = all at once


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0  # steps between evaluations; 0 = no evaluation
    problems: int = 64  # held-out problems
    max_new_tokens: int = 256  # longest answer in an evaluation
    teacher_text: int = 0  # tokens of teacher text per held-out problem to measure KL on; 0 = off


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps between checkpoints; 0 = only at the end
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest one


@dataclass(frozen=True)
class ReportConfig:
    metric: str = "greedy_accuracy"  # evaluation metric that the report is about
    threshold: float = 0.9  # value of it that "time to reach" means
    higher_is_better: bool = True  # False for divergences


@dataclass(frozen=True)
class Config:
    """One experiment.

    `arms` are for `compare`: each has a `name` and the keys that differ, for example
    {name: esr-32, max_new_tokens: 32} (short for rollout.max_new_tokens) or
    {name: last-32, loss.window: last, loss.window_tokens: 32}.
    """

    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: ModelConfig = field(default_factory=ModelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    steps: int = 100  # optimizer steps
    seeds: list[int] = field(default_factory=lambda: [0])  # `train` uses the first, `compare` all
    arms: list[dict[str, Any]] = field(default_factory=list)  # what `compare` compares


# Keys of an arm that may be written without their section.
_ARM_SHORT = {"max_new_tokens": "rollout.max_new_tokens"}
_POSITIVE = (
    "steps rollout.prompts rollout.samples rollout.max_new_tokens loss.fixed_length "
    "loss.window_tokens loss.temperature optim.lr optim.micro_batch eval.problems "
    "eval.max_new_tokens"
).split()
_NOT_NEGATIVE = "optim.warmup_steps eval.every eval.teacher_text checkpoint.every".split()


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, where its last value would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (at, _) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is given twice", at.start_mark
                )
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read `path` (YAML), apply "section.key=value" overrides (values in YAML), check the lot."""
    if not path.is_file():
        raise ConfigError(f"config: {path} is not a file")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid YAML: {_one_line(error)}") from error
    config = config_from_dict(data)
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override: got {override!r}, expected section.key=value")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {key}: {_one_line(error)}") from error
        config = _set(config, key.strip(), value)
    return check(config)


def config_from_dict(data: Any) -> Config:
    """Build a Config from plain data (as YAML gives it); values are checked for type only."""
    config: Config = _build(Config, data, "")
    return config


def with_overrides(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted keys replaced, checked."""
    for key, value in changes.items():
        config = _set(config, key, value)
    return check(config)


def arm_config(config: Config, arm: Mapping[str, Any]) -> Config:
    """The configuration that one arm of a comparison trains with."""
    changes = {_ARM_SHORT.get(key, key): value for key, value in arm.items() if key != "name"}
    try:
        return with_overrides(dataclasses.replace(config, arms=[]), changes)
    except ConfigError as error:
        raise ConfigError(f"arm {arm['name']}: {error}") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=100)


def check(config: Config) -> Config:
    """Check values against each other and against their ranges; return `config` unchanged."""
    for section in ("student", "teacher"):
        if not getattr(config, section).model:
            raise ConfigError(
                f"{section}.model: missing; give builtin:NAME, smollm2, a hub id or a path"
            )
    for key in _POSITIVE:
        value = _get(config, key)
        if value is not None and not value > 0:
            raise ConfigError(f"{key}: got {value!r}, must be above 0")
    for key in _NOT_NEGATIVE:
        if not _get(config, key) >= 0:
            raise ConfigError(f"{key}: got {_get(config, key)!r}, must be 0 or above")
    if not (config.rollout.temperature == 0 or 1e-6 <= config.rollout.temperature < math.inf):
        raise ConfigError(
            f"rollout.temperature: got {config.rollout.temperature!r}, must be 0 (greedy) or a "
            "finite number of at least 1e-6"
        )
    if config.loss.denominator == "fixed" and config.loss.fixed_length is None:
        raise ConfigError(
            'loss.fixed_length: needed (a number of tokens) by loss.denominator "fixed"'
        )
    if not config.seeds or len(set(config.seeds)) != len(config.seeds):
        raise ConfigError(f"seeds: got {config.seeds}, must be different integers, at least one")
    names = [arm.get("name") for arm in config.arms]
    for name in names:
        if not isinstance(name, str) or not name or set(name) & set("/\\") or name.startswith("."):
            raise ConfigError(f"arms: each needs a name that can be a directory, got {name!r}")
        if names.count(name) > 1:
            raise ConfigError(f"arms: the name {name!r} is used twice")
    for arm in config.arms:
        arm_config(config, arm)
    return config


def _build(cls: type, data: Any, prefix: str) -> Any:
    if not isinstance(data, Mapping):
        where = prefix.rstrip(".") or "config"
        raise ConfigError(f"{where}: got {data!r}, expected a mapping of keys to values")
    hints = get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            raise ConfigError(_unknown(prefix + str(key)))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(hint, value, f"{prefix}{key}.")  # type: ignore[arg-type]
        else:
            values[key] = _typed(hint, value, prefix + key)
    return cls(**values)


def _set(config: Any, key: str, value: Any) -> Any:
    if key not in _all_keys(Config, sections=True):
        raise ConfigError(_unknown(key))
    head, _, rest = key.partition(".")
    if rest:
        section = getattr(config, head)
        hint = get_type_hints(type(section))[rest]
        replaced = dataclasses.replace(section, **{rest: _typed(hint, value, key)})
        return dataclasses.replace(config, **{head: replaced})
    hint = get_type_hints(Config)[head]
    if dataclasses.is_dataclass(hint):
        return dataclasses.replace(config, **{head: _build(hint, value, head + ".")})  # type: ignore[arg-type]
    return dataclasses.replace(config, **{head: _typed(hint, value, head)})


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _all_keys(cls: type, prefix: str = "", sections: bool = False) -> list[str]:
    keys = []
    for key, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(hint, f"{prefix}{key}.")  # type: ignore[arg-type]
            keys += [prefix + key] if sections else []
        else:
            keys.append(prefix + key)
    return keys


def _unknown(key: str) -> str:
    known = _all_keys(Config, sections=True)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not nearest:  # a key written without its section
        nearest = [k for k in known if k.endswith("." + key)][:1]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown key {key!r}{hint}"


def _typed(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint` says; floats may be given as ints or as "1e-4", text to YAML."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        # YAML 1.1 reads the word `off` as False.
        value = "off" if value is False and "off" in arguments else value
        if value not in arguments:
            raise ConfigError(
                f"{key}: got {value!r}, allowed are {', '.join(map(repr, arguments))}"
            )
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _typed(next(a for a in arguments if a is not type(None)), value, key)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: got {value!r}, expected a list")
        return [_typed(arguments[0], item, f"{key}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: got {value!r}, expected a mapping")
        return dict(value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(
        f"{key}: got {value!r} of type {type(value).__name__}, expected {hint.__name__}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
