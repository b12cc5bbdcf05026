"""`esr-train diagnose --dry-run`: how much a diagnosis samples, scores and trains."""

from __future__ import annotations

from pathlib import Path

from esr_train.config import Config
from esr_train.diagnose.bench import (
    arm_names,
    check_keys,
    problem_count,
    training_config,
    windows,
)
from esr_train.diagnose.run import check_run
from esr_train.diagnose.teacher_decay import prefixes
from esr_train.dry_run import describe, make_plan
from esr_train.models import max_positions
from esr_train.rollout import ContextError
from esr_train.tasks import load_task


def describe_diagnosis(config: Config, on: str | None = None) -> str:
    """The sizes as text, after what the training of its arms takes.

    Raises:
        AdapterError, ConfigError, ContextError, ModelError: what the diagnosis would be refused
            for, as far as configs, tokenizers and local data can tell.
    """
    check_keys(config)
    plan, keys = make_plan(training_config(config), on), config.diagnose
    limit, samples = config.eval.max_new_tokens, config.eval.samples
    for who, model in (("student", plan.student), ("teacher", plan.teacher)):
        room = max_positions(model)
        if room is not None and plan.prompt + limit > room:
            raise ContextError(
                f"context overflow: diagnose with answers of {limit} tokens after a prompt of "
                f"{plan.prompt} exceeds the {who}'s {room}"
            )
    if keys.run:
        check_run(config, Path(keys.run))
    problems = keys.problems
    if plan.prompt_known:  # else the data is on the hub, and is not read
        problems = problem_count(config, load_task(config.data))
    rows = problems * samples
    arms, seeds = arm_names(config), config.seeds
    students = len(arms) * len(seeds)
    continued = prefixes(keys.prefixes, limit)
    left = sum(limit - k for k in continued)
    # Two controls go on from every prefix beside the teacher; both models start once more.
    sampled = rows * (limit * (2 + students + 2) + 3 * left)
    texts = 2 + 3 * students  # and, with merged terminators, two more
    training = "models of " + keys.run if keys.run else "trained here"
    lines = [
        f"diagnose: {problems} problems, {samples} sampled for each by every model, of at most "
        f"{limit} tokens; windows of {', '.join(map(str, windows(config)))} first tokens",
        f"  students after training: {', '.join(arms)}, seeds {', '.join(map(str, seeds))} "
        f"({training})",
        f"  the teacher goes on after {', '.join(map(str, continued))} tokens"
        if continued
        else f"  the teacher goes on after no prefix: none of diagnose.prefixes is below {limit}",
        f"  at most {sampled:,} tokens sampled by student and teacher, and "
        f"{(texts + 2) * rows * limit:,} scored by both, besides training",
    ]
    return "\n".join([*([] if keys.run else [describe(training_config(config), on)]), *lines])
