"""`esr-train compare`: the same student, prompts, engine and seeds, trained with several arms.

All arms of a seed start from the same weights and see the same prompts in the same order. Which arm
goes first rotates from seed to seed, so that a machine that slows down or warms up favours none.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esr_train.config import Config, ConfigError, arm_config, with_overrides
from esr_train.experiment import load_experiment, progress_bar, progress_text, write_run_files
from esr_train.report import summary_table, write_report
from esr_train.train import Trainer


class Interrupted(KeyboardInterrupt):
    """A comparison that was stopped; the message says what is there."""


def compare(
    config: Config, run_dir: Path, max_steps: int | None = None, say: Callable[[str], None] = print
) -> Path:
    """Train every arm with every seed, write the report, return the path of report.html.

    Args:
        max_steps: cap on the steps of every arm.

    Raises:
        Interrupted: SIGINT or SIGTERM; the runs that had finished are whole.
    """
    config = cap_steps(config, max_steps)
    if not config.arms:
        raise ConfigError("arms: compare needs a list of {name, max_new_tokens}")
    arms = {arm["name"]: arm_config(config, arm) for arm in config.arms}
    experiment = load_experiment(config)
    _clear(run_dir)
    write_run_files(run_dir, config)
    initial = {k: v.detach().cpu().clone() for k, v in experiment.student.state_dict().items()}
    order = run_order(list(arms), config.seeds)

    def trainer(name: str, seed: int, **options: Any) -> Trainer:
        return Trainer(
            arms[name],
            experiment.student,
            experiment.teacher,
            experiment.tokenizer,
            experiment.task,
            experiment.evaluator,
            run_dir / "arms" / name / f"seed{seed}",
            seed,
            save=False,
            **options,
        )

    for name in arms:  # an arm whose prompts do not fit is refused before any has trained
        trainer(name, config.seeds[0])
    finished = 0
    try:
        with progress_bar(sum(arms[name].steps for name, _ in order)) as bar:

            def on_step(row: dict[str, Any], metrics: dict[str, float]) -> None:
                bar.set_postfix_str(progress_text(row, metrics, config.report.metric))
                bar.update()

            for name, seed in order:
                bar.set_description(f"{name} seed {seed}")
                experiment.student.load_state_dict(initial)
                trainer(name, seed, on_step=on_step).run()
                finished += 1
    except KeyboardInterrupt as error:
        done = ", ".join(f"{name} seed {seed}" for name, seed in order[:finished]) or "none"
        raise Interrupted(
            f"interrupted: finished runs: {done}, of {len(order)}; their files are in {run_dir}, "
            f"and `esr-train report {run_dir}` makes a report of them"
        ) from error
    report = write_report(run_dir)
    say(summary_table(run_dir))
    say(str(report))
    return report


def run_order(names: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """(arm, seed) in the order they run: seed by seed, the arms rotated by one each time."""
    order = []
    for index, seed in enumerate(seeds):
        shift = index % len(names)
        order += [(name, seed) for name in names[shift:] + names[:shift]]
    return order


def cap_steps(config: Config, max_steps: int | None) -> Config:
    """`config` with no arm above `max_steps`; None caps nothing."""
    if max_steps is None:
        return config
    arms = [
        {**arm, "steps": min(arm["steps"], max_steps)} if "steps" in arm else arm
        for arm in config.arms
    ]
    return with_overrides(config, {"steps": min(config.steps, max_steps), "arms": arms})


def _clear(run_dir: Path) -> None:
    """Make room for a new comparison; only an earlier one is ever removed."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / "environment.json").is_file() or (run_dir / "arms" / "train").exists():
        raise ConfigError(f"--out: {run_dir} is not empty and holds no earlier comparison")
    for name in ("arms", "figures"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("report.html", "report.md", "summary.json"):
        (run_dir / name).unlink(missing_ok=True)
