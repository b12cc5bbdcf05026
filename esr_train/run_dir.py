"""A run directory: the files written before training starts, and checks of an existing one."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from esr_train.config import Config, ConfigError, arm_config, load_config, to_yaml
from esr_train.metrics import cpu_name
from esr_train.report.tuning import FILE

_PACKAGES = "torch triton transformers tokenizers safetensors flash-attn liger-kernel".split()
# Settings that may differ between a run and its continuation.
_MAY_CHANGE = {"steps", "eval", "checkpoint", "report", "diagnose", "arms", "seeds"}
# The same for a comparison; an arm or a seed may be added.
_MAY_CHANGE_BETWEEN_ARMS = {"checkpoint", "report", "diagnose", "arms", "seeds"}


def write_run_files(directory: Path, config: Config, jobs: int = 1) -> None:
    """Write config.yaml and environment.json; with `jobs` above 1, each job has one thread."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    facts = json.dumps(environment(jobs), indent=2)
    (directory / "environment.json").write_text(facts + "\n", encoding="utf-8")


def check_continues(directory: Path, config: Config) -> None:
    """Raise ConfigError if `directory` holds a run that was made with other settings."""
    path = _config_in(directory, "run")
    if path is not None:
        _check_same(directory, _earlier(path), config, _MAY_CHANGE)


def check_comparison(directory: Path, config: Config, anew: bool) -> None:
    """Raise ConfigError if `directory` holds anything but a comparison with these settings.

    With `anew`, which replaces it, the settings may be others.
    """
    path = _config_in(directory, "comparison")
    if path is None:
        return
    if (directory / "arms" / "train").exists():
        raise ConfigError(f"--out: {directory} holds a run of `train`, not a comparison")
    if anew:
        return
    before, advice = _earlier(path), ", or checkpoint.resume=never to replace it"
    _check_same(directory, before, config, _MAY_CHANGE_BETWEEN_ARMS, advice)
    arms = {arm["name"]: arm for arm in before.arms}
    for arm in config.arms:
        was = arms.get(arm["name"])
        if was is None or was == arm:
            continue
        both = arm_config(before, was), arm_config(config, arm)
        if _differing(*both, _MAY_CHANGE_BETWEEN_ARMS):
            raise _other(directory, arm["name"], was, arm, advice)


def check_diagnosis(directory: Path, config: Config) -> None:
    """Raise ConfigError if `directory` holds anything but a diagnosis with these settings."""
    path = _config_in(directory, "diagnosis")
    if path is None:
        return
    if (directory / "arms").exists():
        raise ConfigError(f"--out: {directory} holds a run, not a diagnosis; see diagnose.run")
    _check_same(directory, _earlier(path), config, set())


def clear_comparison(directory: Path) -> None:
    """Remove an earlier comparison, and no other file."""
    for name in ("arms", "figures"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in ("report.html", "report.md", "summary.json"):
        (directory / name).unlink(missing_ok=True)


def _config_in(directory: Path, what: str) -> Path | None:
    """The configuration that `directory` was made with, None if it is empty."""
    path = directory / "config.yaml"
    if path.is_file():
        return path
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out: {directory} is not a directory")
    # A comparison that is tuned begins with its grid.
    if directory.is_dir() and {path.name for path in directory.iterdir()} - {"tuning", FILE}:
        raise ConfigError(f"--out: {directory} is not empty and holds no earlier {what}")
    return None


def config_of(run_dir: Path) -> Config:
    """The configuration of a run.

    Raises:
        ConfigError: there is no run, or it was made with keys that are unknown now.
    """
    return _earlier(run_dir / "config.yaml")


def _earlier(path: Path) -> Config:
    """The configuration of an earlier run; a key that did not exist then has its default."""
    try:
        return load_config(path)
    except ConfigError as error:
        raise ConfigError(f"{path}, of the earlier run there, cannot be used: {error}") from error


def _check_same(
    directory: Path, before: Config, now: Config, may_change: set[str], advice: str = ""
) -> None:
    for key in _differing(before, now, may_change):
        raise _other(directory, key, _plain(before, key), _plain(now, key), advice)


def _differing(before: Config, now: Config, may_change: set[str]) -> list[str]:
    both = [_without_addresses(config) for config in (before, now)]
    keys = [key for key in Config.model_fields if key not in may_change]
    return [key for key in keys if getattr(both[0], key) != getattr(both[1], key)]


def _without_addresses(config: Config) -> Config:
    """A server may start again elsewhere, where its model has another name, and be asked in another
    way; that it is one stays. Models may be whole or in parts, and a teacher on another device."""
    sections = {}
    for name in ("teacher", "rollout"):
        section = getattr(config, name)
        any_server = {"url": section.url and "any", "served_name": None}
        sections[name] = section.model_copy(update=any_server)
    sections["teacher"] = sections["teacher"].model_copy(update={"placement": None})
    usual = {"requests": 1, "request_seconds": 1.0, "fsdp": False}
    return config.model_copy(
        update={**sections, "runtime": config.runtime.model_copy(update=usual)}
    )


def _plain(config: Config, key: str) -> Any:
    return config.model_dump(include={key})[key]


def _other(directory: Path, key: str, was: Any, now: Any, advice: str) -> ConfigError:
    while isinstance(was, dict) and isinstance(now, dict):  # a section: its first key that differs
        part = next(name for name in {**was, **now} if was.get(name) != now.get(name))
        key, was, now = f"{key}.{part}", was.get(part), now.get(part)
    return ConfigError(
        f"{directory} holds a run with another configuration: {key} was {was}, is {now}; "
        f"choose another --out{advice}"
    )


def environment(jobs: int) -> dict[str, Any]:
    """Versions, hardware, date, and how timings are taken."""
    cuda = torch.cuda.is_available()
    threads = 1 if jobs > 1 else torch.get_num_threads()
    together = f"{jobs} runs at a time, each" if jobs > 1 else "one run at a time,"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "jobs": jobs,
        "threads": threads,
        "timings": f"{together} in a process with {threads} CPU thread{'s' * (threads > 1)}, on a "
        f"machine with {os.cpu_count()} cores; the same for all arms",
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "git_commit": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with a + if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "."], capture_output=True, text=True
        )
    except OSError:  # git is not installed
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
