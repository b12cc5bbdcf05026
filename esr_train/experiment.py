"""The models and the task of a configuration, loaded and checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from esr_train.alignment import Alignment
from esr_train.config import Config, ConfigError, LossConfig
from esr_train.data import PromptStream, TokenizedTask
from esr_train.evaluate import Evaluator
from esr_train.loss import check_divergence
from esr_train.models import compiled, eos_ids, head, load_pair, load_tokenizer
from esr_train.placement import check_processes
from esr_train.rollout import PrefixRollout
from esr_train.tasks import load_task
from esr_train.teacher import DistantTeacher, Teacher
from esr_train.terminators import Groups, Terminators
from esr_train.vocabulary import Vocabulary, shared_vocabulary
from esr_train.world import ONE, World


@dataclass(frozen=True)
class Experiment:
    """A student and a teacher, what their vocabularies share, and the task that they work on."""

    student: PrefixRollout  # samples from the model that is trained
    teacher: Any  # a Teacher, or a RemoteTeacher where teacher.url is set
    teacher_tokenizer: Any
    tokenized: TokenizedTask  # the task's prompts, for both models
    alignment: Alignment  # what of a text is compared
    stops: Groups  # rows of both heads that end an answer
    notes: str  # on vocabularies and terminators, a text to print
    evaluator: Evaluator | None  # None if eval.every is 0
    world: World = ONE  # the processes that share its work

    def classes(self, loss: LossConfig) -> Vocabulary:
        """What a loss is over: the shared vocabulary, with terminators merged where it says so.

        Raises:
            ConfigError: a model has no terminator to merge.
        """
        if not loss.merge_terminators:
            return self.alignment.vocabulary
        if not all(self.stops):
            raise ConfigError(
                "loss.merge_terminators: a model has no token that ends an answer; set "
                "eos_token_id in its generation config"
            )
        return replace(self.alignment.vocabulary, merge=self.stops)


def load_experiment(config: Config, world: World = ONE) -> Experiment:
    """Load all that a run needs.

    Raises:
        AdapterError, ConfigError, ContextError, FetchError, ModelError: a part that cannot be used.
        ServerError: the teacher's server does not answer.
    """
    check_divergence(config.loss)
    check_processes(config, world.size)
    task = load_task(config.data)
    tokenizer = load_tokenizer(config.student, config.runtime)
    teacher_tokenizer = load_tokenizer(config.teacher, config.runtime)
    models = load_pair(config)
    rows = head(models[0]).weight.shape[0], head(models[1]).weight.shape[0]
    vocabulary = shared_vocabulary(tokenizer, teacher_tokenizer, rows)
    vocabulary = vocabulary.on(head(models[0]).weight.device)
    ends = Terminators(
        student=tuple(eos_ids(models[0], tokenizer)),
        teacher=tuple(eos_ids(models[1], teacher_tokenizer)),
    )
    shared: Any = vocabulary.classes
    if vocabulary.student_ids is not None:
        shared = vocabulary.student_ids, vocabulary.teacher_ids
    stops = ends.groups(rows, shared)
    # With other tokenizers each model samples from all of its own tokens.
    limit = vocabulary.classes if vocabulary.same_tokens else None
    student = PrefixRollout(models[0], tokenizer, limit, stop_ids=stops[0])
    if config.teacher.url:
        from esr_train.remote.teacher import remote_teacher  # nothing of it without a server

        teacher: Any = remote_teacher(config, vocabulary, list(stops[1]), rows[1])
    else:
        make = partial(PrefixRollout, models[1], teacher_tokenizer, limit, stop_ids=stops[1])
        teacher = _placed(config, world, models, make)
    tokenized = TokenizedTask(
        task, tokenizer, config.data, teacher_tokenizer, vocabulary.same_tokens
    )
    alignment = Alignment(vocabulary, tokenizer, teacher_tokenizer)
    evaluator = None
    if config.eval.every:
        evaluator = Evaluator(config, student, teacher, tokenized, alignment, world)
    notes = [
        vocabulary.note,
        ends.describe(tokenizer, teacher_tokenizer, config.loss.merge_terminators),
    ]
    if config.teacher.url:
        notes.append(teacher.server.note)
    return Experiment(
        student,
        teacher,
        teacher_tokenizer,
        tokenized,
        alignment,
        stops,
        "\n".join(note for note in notes if note),
        evaluator,
        world,
    )


def _placed(
    config: Config, world: World, models: tuple[Any, Any], make: Callable[[], PrefixRollout]
) -> Teacher:
    """The second of the models as the teacher, by `teacher.placement`; `make` makes its rollout."""
    placement, (student, model) = config.teacher.placement, models
    if placement == "fsdp":
        from esr_train.sharded import sharded_teacher  # nothing of it in one process

        return sharded_teacher(world, model, make)
    forward = compiled(model, config.runtime)
    if placement is None:
        return Teacher(make(), forward)
    return DistantTeacher(make(), head(student).weight.device, forward)


def check_context(config: Config, experiment: Experiment, seed: int) -> None:
    """Raise ContextError before any work if a prompt of any step does not fit."""
    prompts = PromptStream(experiment.tokenized, config.rollout.prompts, seed, config.rollout.pool)
    for step in range(1, config.steps + 1):
        asked, length = prompts.prompts_for(step), config.rollout.max_new_tokens
        experiment.student.check_fits(asked, length)
        read = prompts.teacher_prompts_for(step)
        experiment.teacher.rollout.check_fits(asked if read is None else read, length)
        if step * prompts.per_step >= len(prompts.problems):
            break  # every prompt has been checked
