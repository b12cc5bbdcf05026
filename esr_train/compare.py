"""`esr-train compare`: the same student, prompts, engine and seeds, trained with several arms.

All arms of a seed start from the same weights and see the same prompts in the same order. Which arm
goes first rotates from seed to seed, so that a machine that slows down or warms up favours none.
Runs go one after another, or side by side in processes of one thread each; either way all arms are
timed in the same way. A comparison that was interrupted resumes: runs that had finished are left as
they are, the others resume from their newest checkpoint (`checkpoint.every`) or start again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esr_train.alarms import Announcer
from esr_train.arms import Arms, run_order
from esr_train.config import Config, ConfigError, with_overrides
from esr_train.models import device
from esr_train.progress import duration, estimate, progress_bar, progress_text
from esr_train.report import summary_table, write_report
from esr_train.report.tuning import FILE, read_tuning
from esr_train.run_dir import check_comparison, clear_comparison, write_run_files
from esr_train.worker import run_side_by_side
from esr_train.world import ONE, World

# Of student and teacher together. Up to this size a second thread speeds up a step by a third or
# less, so one process per core finishes sooner.
SMALL_PARAMETERS = 20_000_000


class Interrupted(KeyboardInterrupt):
    """A comparison that was stopped; the message says which runs are complete."""


def compare(
    config: Config,
    run_dir: Path,
    max_steps: int | None = None,
    jobs: int | None = 1,
    say: Callable[[str], None] = print,
    world: World = ONE,
) -> Path:
    """Train every arm with every seed, write the report, return the path of report.html.

    Of several processes all call it, and share the work of each run.

    Args:
        max_steps: cap on the steps of every arm.
        jobs: runs at a time. Above 1, each is in a worker process with one thread; 1 trains in this
            process with the threads that it has; None is `default_jobs`. 1 on several processes.

    Raises:
        ArmError: a run failed in its worker.
        ConfigError: `run_dir` holds a comparison with other settings, or something else.
        Interrupted: SIGINT or SIGTERM; the same call goes on from there.
    """
    config = cap_steps(config, max_steps)
    if world.size > 1 and jobs is not None and jobs > 1:
        raise ConfigError(
            f"--jobs: got {jobs}, must be 1 on several processes, which share each run"
        )
    anew = config.checkpoint.resume == "never"
    world.from_main(lambda: check_comparison(run_dir, config, anew))
    arms = Arms(config, world)
    arms.check()
    order = run_order(list(arms.configs), config.seeds)
    finished = world.from_main(lambda: _prepare(config, arms, run_dir, order))
    waiting = [run for run in order if run not in finished]
    if waiting:
        jobs = min(len(waiting), default_jobs(arms) if jobs is None else jobs)
        if world.main:
            write_run_files(run_dir, config, jobs)
            say(arms.experiment.notes)
            say(_announcement(arms, waiting, jobs))
        try:
            _train(arms, run_dir, waiting, jobs, finished.append)
        except KeyboardInterrupt as error:
            done = ", ".join(f"{name} seed {seed}" for name, seed in finished) or "none"
            raise Interrupted(
                f"interrupted: finished runs: {done}, of {len(order)}; their files are in "
                f"{run_dir}. The same command with --out {run_dir} goes on from there, and "
                f"`esr-train report {run_dir}` makes a report of what there is"
            ) from error
    report = world.from_main(lambda: write_report(run_dir))
    if world.main:
        say(summary_table(run_dir))
        say(str(report))
    return report


def _prepare(
    config: Config, arms: Arms, run_dir: Path, order: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Lay out the directory; returns the runs that an earlier call has finished."""
    if config.checkpoint.resume == "never":
        clear_comparison(run_dir)
    _copy_choice(config, run_dir)
    return [run for run in order if arms.finished(run_dir, *run)]


def _copy_choice(config: Config, run_dir: Path) -> None:
    """Keep what the arms' learning rates were chosen from, for the report to check and to show."""
    source = config.tune.chosen_in
    if source is None:
        return
    if read_tuning(Path(source)) is None:
        raise ConfigError(f"tune.chosen_in: got {source!r}, which has no {FILE}")
    run_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(source) / FILE, run_dir / FILE)


def _train(
    arms: Arms,
    run_dir: Path,
    runs: list[tuple[str, int]],
    jobs: int,
    on_finished: Callable[[tuple[str, int]], None],
) -> None:
    """Train `runs`, with a progress bar over their steps."""
    metric = next(iter(arms.configs.values())).report.metric
    at = dict.fromkeys(runs, 0)
    steps, main = sum(arms.configs[name].steps for name, _ in runs), arms.experiment.world.main
    with progress_bar(steps, shown=main) as bar:
        announce = Announcer(bar.write)

        def on_step(name: str, seed: int, row: dict[str, Any], metrics: dict) -> None:
            announce(row, f"{name} seed {seed}")
            bar.set_description(f"{name} seed {seed}", refresh=False)
            bar.set_postfix_str(progress_text(row, metrics, metric))
            # A run that goes on from a checkpoint begins in the middle.
            bar.update(row["step"] - at[name, seed])
            at[name, seed] = row["step"]

        if jobs > 1:
            run_side_by_side(run_dir, runs, jobs, on_step, on_finished)
            return
        for name, seed in runs:
            arms.run(run_dir, name, seed, partial(on_step, name, seed) if main else None)
            on_finished((name, seed))


def default_jobs(arms: Arms) -> int:
    """As many runs at a time as PyTorch has threads, if the models are small and on the CPU."""
    if arms.experiment.world.size > 1:
        return 1
    models = arms.experiment.student.model, arms.experiment.teacher.model
    parameters = sum(p.numel() for model in models for p in model.parameters())  # not a server's
    small = device().type == "cpu" and parameters <= SMALL_PARAMETERS
    return torch.get_num_threads() if small else 1


def cap_steps(config: Config, max_steps: int | None) -> Config:
    """`config` with the steps of every arm limited to `max_steps`; unchanged for None.

    Raises:
        ConfigError: there are no arms.
    """
    if not config.arms:
        raise ConfigError("arms: compare needs a list of {name, max_new_tokens}")
    if max_steps is None:
        return config
    arms = [
        {**arm, "steps": min(arm["steps"], max_steps)} if "steps" in arm else arm
        for arm in config.arms
    ]
    return with_overrides(config, {"steps": min(config.steps, max_steps), "arms": arms})


def _announcement(arms: Arms, order: list[tuple[str, int]], jobs: int) -> str:
    """The number of runs, how they run, and in one process an estimate of the time."""
    processes = arms.experiment.world.size
    if processes > 1:
        return f"{len(order)} runs, one after another on {processes} processes"
    threads = torch.get_num_threads()
    if jobs > 1:
        torch.set_num_threads(1)
    try:
        seconds = estimate(arms, order, jobs)
    finally:
        torch.set_num_threads(threads)
    how = f"{jobs} at a time on one thread each" if jobs > 1 else "one at a time"
    return (
        f"{len(order)} runs, {how}: up to {duration(seconds)}, estimated from the time of a few "
        "tokens"
    )
