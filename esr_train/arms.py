"""The arms of a comparison, trained in this process one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from esr_train.config import Config, arm_config
from esr_train.evaluate import Evaluation
from esr_train.experiment import load_experiment
from esr_train.train import Trainer


class Arms:
    """Every arm of a config; `run` starts each from the same weights."""

    def __init__(self, config: Config) -> None:
        self.configs = {arm["name"]: arm_config(config, arm) for arm in config.arms}
        self.first_seed = config.seeds[0]
        self.experiment = load_experiment(config)
        student = self.experiment.student.model
        self._weights = {k: v.detach().cpu().clone() for k, v in student.state_dict().items()}
        self._initial: Evaluation | None = None  # evaluation of those weights

    def check(self, run_dir: Path) -> None:
        """Raise ContextError if the prompts of an arm do not fit, before any arm has trained."""
        for name in self.configs:
            self._trainer(run_dir, name, self.first_seed)

    def run(
        self,
        run_dir: Path,
        name: str,
        seed: int,
        on_step: Callable[[dict[str, Any], dict[str, float]], None],
    ) -> None:
        """Train one arm with one seed."""
        self.experiment.student.model.load_state_dict(self._weights)
        trainer = self._trainer(run_dir, name, seed, initial=self._initial, on_step=on_step)
        trainer.run()
        self._initial = trainer.initial

    def _trainer(self, run_dir: Path, name: str, seed: int, **options: Any) -> Trainer:
        directory = run_dir / "arms" / name / f"seed{seed}"
        return Trainer(self.configs[name], self.experiment, directory, seed, save=False, **options)


def run_order(names: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """(arm, seed) in the order they run: seed by seed, the arms rotated by one each time."""
    order = []
    for index, seed in enumerate(seeds):
        shift = index % len(names)
        order += [(name, seed) for name in names[shift:] + names[:shift]]
    return order
