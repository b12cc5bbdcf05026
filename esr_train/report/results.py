"""Reads the results of a run directory.

Only `config.yaml`, `environment.json` and `arms/*/seed*/*.jsonl` are read, so a run that is not
finished, was killed or lacks an arm is reported with the results that it has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esr_train.config import Config, ConfigError, ReportConfig, arm_config, load_config

# Accuracies are means taken in fp32: 0.9 is stored as 0.89999998 and counts as 0.9.
THRESHOLD_SLACK = 1e-6

Row = dict[str, Any]


@dataclass(frozen=True)
class Seed:
    """The log of one training run; rows are sorted by step, one for each."""

    number: int
    metrics: list[Row]
    evals: list[Row]
    samples: list[Row]

    @property
    def last_step(self) -> int:
        return max((int(row["step"]) for row in self.metrics + self.evals), default=0)


@dataclass(frozen=True)
class Arm:
    name: str
    config: Config  # its own, resolved
    seeds: list[Seed]

    @property
    def max_new_tokens(self) -> int:
        return self.config.rollout.max_new_tokens

    @property
    def steps(self) -> int:
        return self.config.steps

    def finished(self, seed: Seed) -> bool:
        """Whether a seed finished all its steps."""
        return seed.last_step >= self.steps


@dataclass(frozen=True)
class Run:
    """A run directory in memory.

    The baseline is the last of `arms`; the others are in order of rollout length, shortest first.
    """

    path: Path
    config: Config
    environment: Row
    arms: list[Arm]
    notes: list[str]

    @property
    def report(self) -> ReportConfig:
        return self.config.report

    @property
    def baseline(self) -> str | None:
        """Name of the arm that ratios refer to; None if none is named or it is the only arm."""
        return self.report.baseline if len(self.arms) > 1 else None

    def passes(self, value: float) -> bool:
        """Whether a metric value is at or past the threshold; False for NaN."""
        gain = value - self.report.threshold
        return (gain if self.report.higher_is_better else -gain) >= -THRESHOLD_SLACK


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises FileNotFoundError where there is no run, ConfigError where its config cannot be used.
    Whatever else is missing or unreadable is named in `notes`.
    """
    run_dir = Path(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"run directory {run_dir}: no config.yaml there; expected a directory written by "
            "`esr-train compare`"
        )
    try:
        config = load_config(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not config.arms:
        raise ConfigError(f"{path}: arms: got [], must be a list of {{name, max_new_tokens}}")
    resolved = {spec["name"]: arm_config(config, spec) for spec in config.arms}

    def place(name: str) -> tuple[bool, int, float]:
        window = resolved[name].loss.window_tokens or math.inf
        return name == config.report.baseline, resolved[name].rollout.max_new_tokens, window

    notes: list[str] = []
    arms = [_read_arm(run_dir, name, resolved[name], notes) for name in sorted(resolved, key=place)]
    environment = _read_environment(run_dir / "environment.json", notes)
    return Run(run_dir, config, environment, arms, notes)


def _read_environment(path: Path, notes: list[str]) -> Row:
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = None
    if not isinstance(environment, dict):
        notes.append("environment.json is missing or unreadable.")
        return {}
    return environment


def _read_arm(run_dir: Path, name: str, config: Config, notes: list[str]) -> Arm:
    """One arm, `config` being its own configuration."""
    seeds = []
    for folder in (run_dir / "arms" / name).glob("seed*"):
        digits = folder.name.removeprefix("seed")
        if folder.is_dir() and digits.isdigit():
            metrics, evals = (
                _by_step(_read_rows(folder / f"{kind}.jsonl", notes))
                for kind in ("metrics", "evals")
            )
            samples = _read_rows(folder / "samples.jsonl", notes)
            seeds.append(Seed(int(digits), metrics, evals, samples))
    seeds.sort(key=lambda seed: seed.number)

    arm = Arm(name, config, seeds)
    if not any(seed.metrics or seed.evals for seed in seeds):
        notes.append(f"{name}: no results.")
        return arm
    missing = [str(k) for k in config.seeds if k not in [seed.number for seed in seeds]]
    if missing:
        notes.append(f"{name}: no results for seed {', '.join(missing)}.")
    for seed in seeds:
        if not arm.finished(seed):
            notes.append(
                f"{name}, seed {seed.number}: stopped at step {seed.last_step} of {arm.steps}."
            )
    return arm


def _read_rows(path: Path, notes: list[str]) -> list[Row]:
    """The JSON objects of a JSONL file; a killed run leaves half a line, which is skipped."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            where = "/".join(path.parts[-3:])
            notes.append(f"{where}, line {index}: unreadable, skipped.")
    return rows


def _by_step(rows: list[Row]) -> list[Row]:
    """Rows sorted by step; of a step written twice (a resumed run) the later row counts."""
    found = {int(row["step"]): row for row in rows if known([number(row, "step")])}
    return [found[step] for step in sorted(found)]


def number(row: Row, *keys: str) -> float:
    """The finite number at row[key][key]..., else NaN (missing, null, text, infinite)."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.nan
    return float(value)


def known(values: Iterable[float]) -> list[float]:
    """The values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def label(name: str) -> str:
    """A metric's name for display."""
    return name.replace("_", " ")


def shorten(name: str, width: int) -> str:
    """A name cut to `width` characters, marked by dots."""
    return name if len(name) <= width else name[: width - 3] + "..."
