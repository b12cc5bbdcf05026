"""`esr-train compare --tune`: a learning rate for each arm, chosen before the test.

    config = tune(config, run_dir)     # its arms have the rates that were chosen
    compare(config, run_dir)

The grid `tune.rates` (of an arm, where it names its own) is trained on `tune.seeds` and evaluated
on held-out problems that the test does not use. Those runs are a comparison of their own in
run_dir/tuning, which resumes and reports like any other; what was chosen, and from what, is in
run_dir/tuning.json. `report.tuning` has the rule.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esr_train.compare import Interrupted, cap_steps, compare
from esr_train.config import Config, ConfigError, arm_config, with_overrides
from esr_train.report.results import read_run
from esr_train.report.tuning import FILE, chosen, grid_name
from esr_train.run_dir import check_comparison
from esr_train.world import ONE, World


def tune(
    config: Config,
    run_dir: Path,
    max_steps: int | None = None,
    jobs: int | None = 1,
    say: Callable[[str], None] = print,
    world: World = ONE,
) -> Config:
    """Train the grid, write tuning.json, return `config` with the rates that were chosen.

    Args: those of `compare`.

    Raises:
        ConfigError: there is no grid, nothing to choose by, or no problem to choose on.
        Else what `compare` raises.
    """
    config = cap_steps(config, max_steps)
    grid = _grid(config)
    # Nothing else may be there.
    world.from_main(lambda: check_comparison(run_dir, config, anew=True))
    try:
        compare(grid, run_dir / "tuning", jobs=jobs, say=say, world=world)
    except Interrupted as error:
        raise Interrupted(
            f"interrupted while the grid was trained; the same command with --out {run_dir} goes "
            "on from there"
        ) from error
    rates = world.from_main(lambda: _choose(config, run_dir))
    if world.main:
        say("chosen: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
    arms = [{**arm, "optim.lr": rates[arm["name"]]} for arm in config.arms]
    return with_overrides(config, {"arms": arms, "tune.chosen_in": None})


def _choose(config: Config, run_dir: Path) -> dict[str, float]:
    """Write tuning.json; returns the rate of each arm."""
    tuning = chosen(read_run(run_dir / "tuning"), config)
    text = json.dumps(_strict(tuning), indent=1, allow_nan=False)
    (run_dir / FILE).write_text(text + "\n", encoding="utf-8")
    return {name: arm["chosen"] for name, arm in tuning["arms"].items()}


def _grid(config: Config) -> Config:
    """The comparison that the rates are chosen from: each arm at each of its rates."""
    if not config.eval.every:
        raise ConfigError("eval.every: got 0, must be above 0 to choose a rate by evaluations")
    arms = []
    for arm in config.arms:
        rates = arm_config(config, arm).tune.rates
        if not rates:
            raise ConfigError(
                f"tune.rates: got [], must be a list of rates, for the arm {arm['name']!r}"
            )
        plain = {key: value for key, value in arm.items() if not key.startswith("tune.")}
        for rate in rates:
            arms.append({**plain, "name": grid_name(arm["name"], rate), "optim.lr": rate})
    return with_overrides(
        config,
        {
            "arms": arms,
            "seeds": config.tune.seeds,
            "eval.validation": True,
            "report.baseline": None,
            "checkpoint.keep_models": False,
            "checkpoint.keep_best": False,
            "tune.rates": [],
            "tune.chosen_in": None,
        },
    )


def _strict(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
