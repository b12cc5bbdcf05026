"""A configuration from YAML plus dotted overrides, and what is wrong with one in a line.

An unknown key is an error that names the nearest known key. A value of the wrong type or out of
range is an error that names the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from esr_train.config.errors import ConfigError
from esr_train.config.sections import Config

# Sections that the arms of a comparison have in common.
_COMMON = ("student", "teacher", "runtime")
# Keys that are about the model named beside them.
_OF_A_MODEL = {"drop_layers": "[]", "adapter": "null"}
# Keys of an arm that may be written without their section.
_ARM_SHORT = {"max_new_tokens": "rollout.max_new_tokens"}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, and 1e-4 is a float as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            problem = f"{twice[0]!r} is given twice in the mapping"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read `path` (YAML), apply "section.key=value" overrides (values in YAML), and check."""
    if not path.is_file():
        raise ConfigError(f"config: {path} is not a file")
    data = _from_yaml(path.read_bytes(), f"config: {path} is not valid YAML") or {}
    changes = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"override: got {override!r}, expected section.key=value")
        if not text.strip():  # a shell variable that is not set, more likely than null
            raise ConfigError(f"override: got {override!r}, without a value; null is written null")
        changes[key.strip()] = _from_yaml(text, f"override {key}")
    return _validated(data, changes)


def with_overrides(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with dotted keys replaced, checked."""
    return _validated(config.model_dump(), changes)


def arm_config(config: Config, arm: Mapping[str, Any]) -> Config:
    """The configuration that one arm of a comparison trains with."""
    changes = {_ARM_SHORT.get(key, key): value for key, value in arm.items() if key != "name"}
    try:
        return with_overrides(config, {"arms": [], "report.baseline": None, **changes})
    except ConfigError as error:
        raise ConfigError(f"arm {arm['name']}: {error}") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same Config."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, width=100)


def _from_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error


def _validated(data: Any, changes: Mapping[str, Any]) -> Config:
    """The Config of plain data with dotted keys replaced."""
    if not isinstance(data, dict):
        raise ConfigError(f"config: got {data!r}, must be a mapping of keys to values")
    _check_of_the_model(data, changes)
    for key, value in changes.items():
        if key not in _known_keys():
            raise ConfigError(_unknown(key))
        data = _replaced(data, key.split("."), value)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise _first_error(error) from error
    _check_arms(config)
    return config


def _check_arms(config: Config) -> None:
    """Raise ConfigError if an arm, or the name of the baseline, cannot be used."""
    names: list[Any] = [arm.get("name") for arm in config.arms]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^./\\][^/\\]*", name):
            raise ConfigError(f"arms: each needs a name that can be a directory, got {name!r}")
        if names.count(name) > 1:
            raise ConfigError(f"arms: the name {name!r} is used twice")
    baseline = config.report.baseline
    if baseline is not None and baseline not in names:
        allowed = ", ".join(map(repr, names)) or "null without arms"
        raise ConfigError(
            f"report.baseline: got {baseline!r}, must be the name of an arm ({allowed})"
            + _did_you_mean(baseline, names)
        )
    for arm in config.arms:
        for key in arm:
            if key.partition(".")[0] in _COMMON:
                raise ConfigError(
                    f"arm {arm['name']}: {key} cannot differ between arms, which share their "
                    "models; make a comparison for each value"
                )
        arm_config(config, arm)


def _replaced(data: Any, path: list[str], value: Any) -> Any:
    """`data` with the value at `path` replaced; what is no mapping stays, to be an error later."""
    if not path:
        return value
    data = {} if data is None else data
    if not isinstance(data, dict):
        return data
    return {**data, path[0]: _replaced(data.get(path[0]), path[1:], value)}


def _check_of_the_model(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Raise ConfigError if another model would get what was meant for the one it replaces."""
    for section in ("student", "teacher"):
        before, model = data.get(section), changes.get(f"{section}.model")
        if model is None or not isinstance(before, dict):
            continue
        if before.get("model") in (None, model):
            continue
        for name, nothing in _OF_A_MODEL.items():
            key = f"{section}.{name}"
            if before.get(name) and key not in changes:
                raise ConfigError(
                    f"{key}: {before[name]} is for {before['model']}; with {section}.model={model} "
                    f"give {key} as well, {key}={nothing} for none"
                )


def _first_error(error: ValidationError) -> ConfigError:
    """One of pydantic's errors in one line; unknown keys first, which may cause a missing one."""
    unknown = ("extra_forbidden", "invalid_key")
    found = min(error.errors(), key=lambda item: item["type"] not in unknown)
    key, cause = ".".join(map(str, found["loc"])), found.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause
    if found["type"] in unknown:
        return ConfigError(_unknown(key))
    if found["type"] == "missing":
        model = key.removesuffix(".model") + ".model"
        return ConfigError(f"{model}: missing; give builtin:NAME, smollm2, a hub id or a path")
    key = re.sub(r"\.(\d+)", r"[\1]", key)
    allowed = re.sub(r"^\w+ should", "must", found["msg"].removeprefix("Value error, "))
    if found["type"] in ("model_type", "dict_type"):
        allowed = "must be a mapping of keys to values"
    return ConfigError(f"{key}: got {found['input']!r}, {allowed}")


def _unknown(key: Any) -> str:
    return f"unknown key {key!r}{_did_you_mean(str(key), _known_keys())}"


def _known_keys(section: Any = None) -> list[str]:
    """Dotted keys of a section, those of sections in it included; of Config if none is given."""
    keys = []
    for name, field in (section or Config).model_fields.items():
        keys.append(name)
        for inner in (field.annotation, *get_args(field.annotation)):
            if hasattr(inner, "model_fields"):
                keys += [f"{name}.{key}" for key in _known_keys(inner)]
    return keys


def _did_you_mean(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    nearest += [key for key in known if key.endswith("." + word)]  # written without its section
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
