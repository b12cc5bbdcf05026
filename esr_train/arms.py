"""The arms of a comparison, trained in this process one after another.

arms/NAME/seed0/metrics.jsonl ...
               /checkpoints/   while it trains
               /finished       an empty file that says it has; then its checkpoints go, but
               /model, /best   the final model and the best one
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esr_train import checkpoint
from esr_train.config import Config, arm_config
from esr_train.criteria import criterion
from esr_train.evaluate import Evaluation
from esr_train.experiment import check_context, load_experiment
from esr_train.train import Trainer, TrainingError
from esr_train.world import ONE, World

_FINISHED = "finished"


class Arms:
    """Every arm of a config; `run` starts each from the same weights."""

    def __init__(self, config: Config, world: World = ONE) -> None:
        self._config = config
        self.configs = {arm["name"]: arm_config(config, arm) for arm in config.arms}
        self.first_seed = config.seeds[0]
        self.experiment = load_experiment(config, world)
        student = self.experiment.student.model
        # What training changes; below adapters that is little.
        self._weights = {
            name: parameter.detach().cpu().clone()
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }
        self._initial: Evaluation | None = None  # evaluation of those weights

    def check(self) -> None:
        """Raise before any arm has trained: ContextError if the prompts of one do not fit, and what
        `criterion` raises."""
        for config in self.configs.values():
            criterion(config, self.experiment)
            check_context(config, self.experiment, self.first_seed)

    def restore(self) -> None:
        """Give the student its initial weights again; one that is in parts is loaded anew."""
        world = self.experiment.world.renewed()
        if world is not self.experiment.world:
            self.experiment = load_experiment(self._config, world)
            return
        parameters = dict(self.experiment.student.model.named_parameters())
        with torch.no_grad():
            for key, weight in self._weights.items():
                parameters[key].copy_(weight)

    def run(
        self,
        run_dir: Path,
        name: str,
        seed: int,
        on_step: Callable[[dict[str, Any], dict[str, float]], None] | None,
    ) -> None:
        """Train one arm with one seed, from its newest checkpoint if there is one."""
        self.restore()
        config, directory = self.configs[name], _directory(run_dir, name, seed)
        trainer = Trainer(
            config, self.experiment, directory, seed, initial=self._initial, on_step=on_step
        )
        trainer.save_end = config.checkpoint.keep_models
        try:
            trainer.run()
        except TrainingError:
            # A rate that a grid asks about may be too high; it is then seen not to reach the end.
            if not config.eval.validation:
                raise
        self._initial = trainer.initial
        self.experiment.world.from_main(lambda: self._finish(run_dir, name, seed))

    def _finish(self, run_dir: Path, name: str, seed: int) -> None:
        (_directory(run_dir, name, seed) / _FINISHED).touch()
        self.finished(run_dir, name, seed)

    def finished(self, run_dir: Path, name: str, seed: int) -> bool:
        """Whether an arm has been trained with a seed; of its checkpoints only models are left."""
        directory = _directory(run_dir, name, seed)
        if not (directory / _FINISHED).is_file():
            return False
        _tidy(directory, self.configs[name].checkpoint.keep_models)
        return True


def _directory(run_dir: Path, name: str, seed: int) -> Path:
    return run_dir / "arms" / name / f"seed{seed}"


def _tidy(directory: Path, keep_models: bool) -> None:
    """Keep the models of a run's checkpoints, or nothing; after a kill, a second call finishes."""
    checkpoints = directory / "checkpoints"
    if keep_models:
        final, best = checkpoint.latest(checkpoints), checkpoint.best(checkpoints)
        for found, name in ((final and final / "model", "model"), (best, "best")):
            if found and found.is_dir() and not (directory / name).exists():
                os.replace(found, directory / name)
    shutil.rmtree(checkpoints, ignore_errors=True)


def run_order(names: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """(arm, seed) in the order they run: seed by seed, the arms rotated by one each time."""
    order = []
    for index, seed in enumerate(seeds):
        shift = index % len(names)
        order += [(name, seed) for name in names[shift:] + names[:shift]]
    return order
