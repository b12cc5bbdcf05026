"""The choice of a learning rate for each arm from runs on validation seeds, and what it rested on.

    tuning = chosen(run_of_the_grid, config)     # run: a comparison with an arm for each rate
    tuning["arms"]["full"]["chosen"]             # 1e-4

`compare --tune` writes it to tuning.json, where a report reads it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esr_train.config import Config, ConfigError, arm_config
from esr_train.report.results import Arm, Run, known, number

FILE = "tuning.json"
KEPT_GAIN = 0.9  # of a stable run, at its end
NEAR_BEST = 0.05  # of the best gain: rates that end as well as the best one
RULE = (
    "A run is stable if it trains to its last step, does not end below its start, and keeps at "
    f"least {KEPT_GAIN:g} of what it had gained at its best evaluation; a rate is stable if all "
    "its runs are. Of the stable rates, those count whose mean at the end is within "
    f"{NEAR_BEST:g} of the best gain of the best one, and of these the one with the largest mean "
    "over all evaluations is chosen; of equal ones, the lowest."
)
# What a rate is chosen for; it says nothing on other settings.
_SETTINGS = ("student", "teacher", "data", "rollout", "loss", "optim", "steps")


@dataclass(frozen=True)
class Rate:
    """The runs of one arm at one rate; metric values, of which `higher_is_better` says the best."""

    rate: float
    ends: list[float]  # of each seed
    end: float  # their mean
    mean: float  # over all evaluations, then over seeds
    gain: float  # end - start, positive where it got better
    kept: float  # the lowest share, over seeds, of the best gain that is left at the end
    unstable: str | None  # why


def grid_name(arm: str, rate: float) -> str:
    """The name of an arm at a rate, in the run of the grid."""
    return f"{arm}@{rate:g}"


def chosen(run: Run, config: Config) -> dict[str, Any]:
    """What tuning.json holds, of the run of a grid over the arms of `config`."""
    found, by_name = {}, {arm.name: arm for arm in run.arms}
    for spec in config.arms:
        own = arm_config(config, spec)
        rates = [
            _judged(run, by_name[grid_name(spec["name"], rate)], rate) for rate in own.tune.rates
        ]
        best, note = _choice(rates)
        found[spec["name"]] = {
            "chosen": best,
            "note": note,
            "rates": [dataclasses.asdict(rate) for rate in rates],
            "settings": settings_of(own),
        }
    return {
        "rule": RULE,
        "metric": run.report.metric,
        "seeds": run.config.seeds,
        "environment": {key: run.environment.get(key) for key in ("date", "cpu", "git_commit")},
        "arms": found,
    }


def read_tuning(directory: Path) -> dict[str, Any] | None:
    """The tuning.json of a directory, None if it has none.

    Raises:
        ConfigError: the file is not one.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        tuning: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for arm in tuning["arms"].values():
            arm["chosen"], arm["rates"], arm["settings"]  # noqa: B018
        tuning["rule"], tuning["seeds"]  # noqa: B018
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the choice of a tuned comparison: {error!r}") from error
    return tuning


def not_tuned(run: Run) -> str | None:
    """Why the rates of a run's arms do not count as chosen on validation seeds; None if they do."""
    tuning = read_tuning(run.path)
    if tuning is None:
        return "no learning rate was chosen per arm on validation seeds (`compare --tune`)"
    common = sorted(set(tuning["seeds"]) & set(run.config.seeds))
    if common:
        return f"the learning rates were chosen on seeds that are reported, {common}"
    for arm in run.arms:
        known_arm = tuning["arms"].get(arm.name)
        if known_arm is None:
            return f"no learning rate was chosen for {arm.name}"
        if known_arm["chosen"] != arm.config.optim.lr:
            return (
                f"{arm.name} was trained at a learning rate of {arm.config.optim.lr:g}, and "
                f"{known_arm['chosen']:g} was chosen on validation seeds"
            )
        other = _other_settings(known_arm["settings"], arm.config)
        if other:
            return f"the learning rate of {arm.name} was chosen for other settings of {other}"
    return None


def settings_of(config: Config) -> dict[str, Any]:
    """What the choice of a rate depends on."""
    settings = config.model_dump(include=set(_SETTINGS))
    del settings["optim"]["lr"]
    return settings


def _other_settings(before: dict[str, Any], config: Config) -> str | None:
    """The name of a section that differs; a key that is new since then has its default."""
    now = Config.model_validate(settings_of(config))
    then = Config.model_validate(before)
    differing = [key for key in _SETTINGS if getattr(now, key) != getattr(then, key)]
    return differing[0] if differing else None


def _judged(run: Run, arm: Arm, rate: float) -> Rate:
    sign = 1 if run.report.higher_is_better else -1
    runs = [
        known(number(row, "metrics", run.report.metric) for row in seed.evals) for seed in arm.seeds
    ]
    runs = [values for values in runs if values]
    if not runs:
        return Rate(rate, [], math.nan, math.nan, -math.inf, -math.inf, "no evaluation")
    gains = [sign * (values[-1] - values[0]) for values in runs]
    best = [max(sign * (value - values[0]) for value in values) for values in runs]
    kept = [end / top if top > 0 else 0.0 for end, top in zip(gains, best, strict=True)]
    unstable = None
    if not all(map(arm.finished, arm.seeds)) or len(runs) < len(run.config.seeds):
        unstable = "did not train to the end"
    elif min(gains) < 0:
        unstable = "ends below its start"
    elif min(kept) < KEPT_GAIN:
        unstable = f"keeps {min(kept):.2f} of its gain"
    ends = [values[-1] for values in runs]
    mean = statistics.fmean(map(statistics.fmean, runs))
    gain = statistics.fmean(gains)
    return Rate(rate, ends, statistics.fmean(ends), sign * mean, gain, min(kept), unstable)


def _choice(rates: list[Rate]) -> tuple[float, str | None]:
    """The chosen rate, and what is to be said of the choice."""
    stable = [rate for rate in rates if rate.unstable is None]
    candidates = stable or rates
    top = max(rate.gain for rate in candidates)
    near = [rate for rate in candidates if rate.gain >= top - NEAR_BEST * max(top, 0.0)]
    best = max(near, key=lambda rate: (rate.mean, -rate.rate))
    if not stable:
        return best.rate, "no rate of the grid is stable; this one ends best"
    edges = {min(rate.rate for rate in rates): "lowest", max(r.rate for r in rates): "highest"}
    if len(rates) > 1 and best.rate in edges:
        return best.rate, f"the {edges[best.rate]} rate of the grid: others may be better"
    return best.rate, None
