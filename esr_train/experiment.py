"""The models and the task of a configuration, loaded and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esr_kernels.divergence.losses import resolve_divergence
from esr_train.config import Config, ConfigError
from esr_train.data import PromptStream, TokenizedTask
from esr_train.evaluate import Evaluator
from esr_train.models import compiled, eos_ids, head, load_pair, load_tokenizer
from esr_train.rollout import PrefixRollout
from esr_train.tasks import load_task
from esr_train.teacher import Teacher, check_same_tokenizer
from esr_train.terminators import Groups, Terminators


@dataclass(frozen=True)
class Experiment:
    """A student and a teacher with a common tokenizer, and the task that they work on."""

    student: PrefixRollout  # samples from the model that is trained
    teacher: Teacher
    teacher_tokenizer: Any
    ends: str  # how answers end, a text to print
    merge: Groups | None  # rows of both heads that the loss merges into one class
    tokenized: TokenizedTask  # the task, with the student's tokenizer
    evaluator: Evaluator | None  # None if eval.every is 0


def load_experiment(config: Config) -> Experiment:
    """Load all that a run needs.

    Raises:
        AdapterError, ConfigError, ContextError, FetchError, ModelError: a part that cannot be used.
    """
    try:
        resolve_divergence(config.loss.divergence)
    except ValueError as error:
        raise ConfigError(f"loss.divergence: {error}") from error
    try:
        task = load_task(config.rollout.task)
    except ValueError as error:
        raise ConfigError(f"rollout.task: {error}") from error
    tokenizer = load_tokenizer(config.student, config.runtime)
    teacher_tokenizer = load_tokenizer(config.teacher, config.runtime)
    models = load_pair(config)
    classes = min(head(model).weight.shape[0] for model in models)
    check_same_tokenizer(tokenizer, teacher_tokenizer, classes)
    ends = Terminators(
        student=tuple(eos_ids(models[0], tokenizer)),
        teacher=tuple(eos_ids(models[1], teacher_tokenizer)),
    )
    rows = [head(model).weight.shape[0] for model in models]
    stops = ends.groups((rows[0], rows[1]), classes)
    merges = config.loss.merge_terminators
    if merges and not all(stops):
        raise ConfigError(
            "loss.merge_terminators: a model has no token that ends an answer; set eos_token_id in "
            "its generation config"
        )
    student, teacher_rollout = (
        PrefixRollout(model, tokenizer, classes, stop_ids=ids)
        for model, ids in zip(models, stops, strict=True)
    )
    teacher = Teacher(teacher_rollout, compiled(models[1], config.runtime))
    tokenized = TokenizedTask(task, tokenizer)
    evaluator = Evaluator(config, student, teacher, tokenized) if config.eval.every else None
    described = ends.describe(tokenizer, teacher_tokenizer, merges)
    merge = stops if merges else None
    return Experiment(student, teacher, teacher_tokenizer, described, merge, tokenized, evaluator)


def check_context(config: Config, experiment: Experiment, seed: int) -> None:
    """Raise ContextError before any work if a prompt of any step does not fit."""
    prompts = PromptStream(experiment.tokenized, config.rollout.prompts, seed)
    for step in range(1, config.steps + 1):
        for rollout in (experiment.student, experiment.teacher.rollout):
            rollout.check_fits(prompts.prompts_for(step), config.rollout.max_new_tokens)
        if step * prompts.per_step >= len(prompts.problems):
            break  # every prompt has been checked
