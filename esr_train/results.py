"""What a run directory says: read its files, reduce them to the numbers that a report states.

Only `config.yaml`, `environment.json` and `arms/*/seed*/*.jsonl` are read, so a run that is still
going, was killed, or lacks an arm is summarised as far as it went. Unknown numbers are NaN; a
threshold that was never reached is infinity.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PHASES = ("rollout", "teacher", "student")
COSTS = ("seconds", "tokens", "steps")
# Accuracies are means taken in fp32: 0.9 is stored as 0.89999998 and counts as 0.9.
THRESHOLD_SLACK = 1e-6

Row = dict[str, Any]


@dataclass(frozen=True)
class Seed:
    """The log of one training run; rows are sorted by step, the last one written wins."""

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
    max_new_tokens: int
    steps: int
    seeds: list[Seed]

    def finished(self, seed: Seed) -> bool:
        """Whether a seed got through all its steps."""
        return seed.last_step >= self.steps


@dataclass(frozen=True)
class Run:
    """A run directory in memory; `arms` from the shortest rollouts to the longest."""

    path: Path
    config: Row
    environment: Row
    arms: list[Arm]
    metric: str
    threshold: float
    higher_is_better: bool
    notes: list[str]

    @property
    def baseline(self) -> Arm:
        """The arm with full rollouts: the one with the largest max_new_tokens."""
        return self.arms[-1]

    def passes(self, value: float) -> bool:
        """Whether a metric value is at or past the threshold; False for NaN."""
        gain = value - self.threshold if self.higher_is_better else self.threshold - value
        return gain >= -THRESHOLD_SLACK


@dataclass(frozen=True)
class Spread:
    """A middle (mean or median, as the field says) with the extremes over `count` seeds."""

    middle: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class ArmSummary:
    """One arm reduced. Ratios are baseline / arm: above 1 means that the arm needs less.

    final, best: mean over seeds of the metric. to_threshold: median over evaluated seeds, where a
    seed that never gets there counts as infinity. ratios: of those medians, low and high over
    the seeds where both arms got there. step_seconds: mean over steps, then seeds, per phase.
    peak_bytes: maximum over steps and seeds, per phase.
    """

    name: str
    max_new_tokens: int
    seeds: int
    evaluated: int
    reached: int
    final: Spread
    best: Spread
    to_threshold: dict[str, float]
    ratios: dict[str, Spread]
    step_seconds: dict[str, float]
    seconds_per_step: float
    tokens_per_step: float
    speedup_per_step: float
    peak_bytes: dict[str, float]
    peak: float
    memory_ratio: float


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


def mean(values: Iterable[float]) -> float:
    """Mean of the known values; NaN where there is none."""
    kept = known(values)
    return statistics.fmean(kept) if kept else math.nan


def label(name: str) -> str:
    """A metric's name as people read it."""
    return name.replace("_", " ")


def shorten(name: str, width: int) -> str:
    """A name cut to `width` characters, marked by dots."""
    return name if len(name) <= width else name[: width - 3] + "..."


def _spread(middle: float, values: list[float]) -> Spread:
    if not values:
        return Spread(math.nan, math.nan, math.nan, 0)
    return Spread(middle, min(values), max(values), len(values))


def divide(numerator: float, denominator: float) -> float:
    """numerator / denominator where both are positive and finite, else NaN."""
    usable = all(math.isfinite(value) and value > 0 for value in (numerator, denominator))
    return numerator / denominator if usable else math.nan


def first_passing(run: Run, seed: Seed) -> dict[str, float] | None:
    """Cost of the first evaluation at or past the threshold; None if the metric was never measured.

    No interpolation between evaluations. Infinity in each cost where no evaluation passes.
    """
    measured = [row for row in seed.evals if known([number(row, "metrics", run.metric)])]
    if not measured:
        return None
    for row in measured:
        if run.passes(number(row, "metrics", run.metric)):
            return {
                "seconds": number(row, "train_seconds"),
                "tokens": number(row, "tokens"),
                "steps": number(row, "step"),
            }
    return dict.fromkeys(COSTS, math.inf)


def summarise(run: Run) -> list[ArmSummary]:
    """One summary an arm, in the order of run.arms."""
    costs = {arm.name: _costs(run, arm) for arm in run.arms}
    base = _step_costs(run.baseline)
    return [_summarise_arm(run, arm, costs, base) for arm in run.arms]


def _costs(run: Run, arm: Arm) -> dict[int, dict[str, float]]:
    found = {seed.number: first_passing(run, seed) for seed in arm.seeds}
    return {k: cost for k, cost in found.items() if cost is not None}


def _step_costs(arm: Arm) -> tuple[dict[str, float], dict[str, float]]:
    """Mean seconds a step and peak bytes, each by phase."""
    seconds = {
        phase: mean(
            mean(number(row, "seconds", phase) for row in seed.metrics) for seed in arm.seeds
        )
        for phase in PHASES
    }
    peaks = {
        phase: max(
            known(number(row, "peak_bytes", phase) for seed in arm.seeds for row in seed.metrics),
            default=math.nan,
        )
        for phase in PHASES
    }
    return seconds, peaks


def _summarise_arm(
    run: Run,
    arm: Arm,
    costs: dict[str, dict[int, dict[str, float]]],
    base: tuple[dict[str, float], dict[str, float]],
) -> ArmSummary:
    values = [known(number(r, "metrics", run.metric) for r in s.evals) for s in arm.seeds]
    values = [series for series in values if series]
    better = max if run.higher_is_better else min
    finals = [series[-1] for series in values]
    bests = [better(series) for series in values]

    own, full = costs[arm.name], costs[run.baseline.name]
    to_threshold, ratios = {}, {}
    for cost in COSTS:
        to_threshold[cost] = _median(own, cost)
        by_seed = known(divide(full[k][cost], own[k][cost]) for k in own if k in full)
        middle = divide(_median(full, cost), to_threshold[cost])
        ratios[cost] = _spread(middle, by_seed)

    seconds, peaks = _step_costs(arm)
    per_step = sum(known(seconds.values())) if known(seconds.values()) else math.nan
    peak = max(known(peaks.values()), default=math.nan)
    return ArmSummary(
        name=arm.name,
        max_new_tokens=arm.max_new_tokens,
        seeds=len(arm.seeds),
        evaluated=len(own),
        reached=sum(math.isfinite(cost["steps"]) for cost in own.values()),
        final=_spread(mean(finals), finals),
        best=_spread(mean(bests), bests),
        to_threshold=to_threshold,
        ratios=ratios,
        step_seconds=seconds,
        seconds_per_step=per_step,
        tokens_per_step=mean(mean(number(r, "tokens") for r in s.metrics) for s in arm.seeds),
        speedup_per_step=divide(sum(known(base[0].values())), per_step),
        peak_bytes=peaks,
        peak=peak,
        memory_ratio=divide(max(known(base[1].values()), default=math.nan), peak),
    )


def _median(costs: dict[int, dict[str, float]], cost: str) -> float:
    kept = known(seed[cost] for seed in costs.values())
    return statistics.median(kept) if kept else math.nan


def read_run(run_dir: Path) -> Run:
    """Read a run directory.

    Raises FileNotFoundError where there is no run, ValueError where its config cannot be used.
    Whatever else is missing or unreadable ends up in `notes`.
    """
    run_dir = Path(run_dir)
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"run directory {run_dir}: no config.yaml there; expected a directory written by "
            "`esr-train compare`"
        )
    config = _read_config(config_path)
    report = config["report"]
    notes: list[str] = []
    arms = [_read_arm(run_dir, config, spec, notes) for spec in _by_length(config)]
    return Run(
        path=run_dir,
        config=config,
        environment=_read_environment(run_dir / "environment.json", notes),
        arms=arms,
        metric=str(report["metric"]),
        threshold=float(report["threshold"]),
        higher_is_better=bool(report.get("higher_is_better", True)),
        notes=notes,
    )


def _read_config(path: Path) -> Row:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    config = config if isinstance(config, dict) else {}
    arms, report = config.get("arms"), config.get("report")
    if not isinstance(arms, list) or not arms:
        raise ValueError(f"{path}: arms: expected a list of {{name, max_new_tokens}}, got {arms!r}")
    for arm in arms:
        if not isinstance(arm, dict) or not isinstance(arm.get("name"), str):
            raise ValueError(f"{path}: arms: each needs a name, got {arm!r}")
        if math.isnan(_max_new_tokens(config, arm)):
            raise ValueError(f"{path}: arms: {arm['name']} has no max_new_tokens, got {arm!r}")
    if not isinstance(report, dict) or not isinstance(report.get("metric"), str):
        raise ValueError(f"{path}: report.metric: expected a name, got report: {report!r}")
    if math.isnan(number(report, "threshold")):
        raise ValueError(f"{path}: report.threshold: expected a number, got report: {report!r}")
    return config


def _max_new_tokens(config: Row, arm: Row) -> float:
    """An arm's own limit, in its short or its dotted spelling, else the configuration's."""
    for key in ("max_new_tokens", "rollout.max_new_tokens"):
        if key in arm:
            return number(arm, key)
    return number(config, "rollout", "max_new_tokens")


def _by_length(config: Row) -> list[Row]:
    """The arms from short to long rollouts; of equally long ones the full window comes last."""
    return sorted(
        config["arms"],
        key=lambda arm: (
            _max_new_tokens(config, arm),
            "loss.window_tokens" not in arm,
            arm["name"] == "full",
        ),
    )


def _read_environment(path: Path, notes: list[str]) -> Row:
    try:
        environment = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = None
    if not isinstance(environment, dict):
        notes.append("environment.json is missing or unreadable.")
        return {}
    return environment


def _read_arm(run_dir: Path, config: Row, spec: Row, notes: list[str]) -> Arm:
    name = spec["name"]
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

    steps = number(spec, "steps") if "steps" in spec else number(config, "steps")
    if math.isnan(steps):
        steps = max((seed.last_step for seed in seeds), default=0)
    arm = Arm(name, int(_max_new_tokens(config, spec)), int(steps), seeds)
    if not any(seed.metrics or seed.evals for seed in seeds):
        notes.append(f"{name}: no results.")
        return arm
    planned = config.get("seeds")
    planned = planned if isinstance(planned, list) else []
    missing = [str(k) for k in planned if k not in [seed.number for seed in seeds]]
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
