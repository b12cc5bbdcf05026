"""What a step minimises: by `loss.divergence`, and by where the teacher is.

A criterion has `names`, what it says of each trained token; `reads`, what it takes of the teacher
before the student's pass, or None; and `loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from esr_train.config import Config, ConfigError, LossConfig
from esr_train.experiment import Experiment
from esr_train.loss import cross_entropy, divergence_from_hidden, select, shared_mass
from esr_train.metrics import PER_TOKEN
from esr_train.models import Head
from esr_train.teacher import Sequences, Teacher
from esr_train.vocabulary import Vocabulary

# Loss; `names` of the trained rows, each [T]; and where tokenizers differ the shared masses, 1.
Found = tuple[Tensor, list[Tensor], tuple[float, float, int]]


class Criterion(Protocol):
    """A loss of the student's hidden states [T, D] at the rows of a batch."""

    @property
    def names(self) -> tuple[str, ...]:
        """What `loss` says of each row."""

    @property
    def reads(self) -> Callable[[Sequences], Any] | None:
        """What it takes of the teacher at the rows of a batch."""

    def loss(self, hidden: Tensor, student: Head, laid_out: Sequences, of_teacher: Any) -> Found:
        """`of_teacher` is what `reads` returned for the same rows."""


def criterion(config: Config, experiment: Experiment) -> Criterion:
    """The criterion of a configuration.

    Raises:
        ConfigError: it cannot be had of this pair of models.
        ServerError: it cannot be had of the teacher's server.
    """
    classes = experiment.classes(config.loss)
    if config.loss.divergence == "cross_entropy":
        return _CrossEntropy(config.loss, classes)
    if config.teacher.url:
        from esr_train.remote.criterion import TopDivergence  # nothing of it without a server

        return TopDivergence(config.loss, experiment.teacher, classes)
    return _Divergence(config.loss, experiment.teacher, classes)


class _Divergence:
    """From a teacher in this process, over all classes that the models share."""

    names = PER_TOKEN

    def __init__(self, config: LossConfig, teacher: Teacher, classes: Vocabulary) -> None:
        self._config, self._teacher, self._classes = config, teacher, classes

    def reads(self, read: Sequences) -> Tensor:
        """The teacher's hidden states."""
        return self._teacher.hidden_rows(read)

    def loss(self, hidden: Tensor, student: Head, laid_out: Sequences, of_teacher: Any) -> Found:
        loss, teacher, weights = self._config, self._teacher.head, laid_out.weights
        if loss.select_by:
            with torch.no_grad():
                plain = replace(student, weight_grad=None)
                signals = divergence_from_hidden(
                    hidden, plain, of_teacher, teacher, None, self._classes, loss
                )
            kept = select(signals, laid_out.rows // laid_out.ids.shape[1], loss)
            hidden, of_teacher, weights = hidden[kept], of_teacher[kept], weights[kept]
        out = divergence_from_hidden(
            hidden, student, of_teacher, teacher, weights, self._classes, loss
        )
        mass: tuple[float, float, int] = 0.0, 0.0, 0
        if not self._classes.same_tokens and len(hidden):
            own = shared_mass(hidden, student, out.student_lse, loss)
            mass = own, shared_mass(of_teacher, teacher, out.teacher_lse, loss), 1
        rows = [out.per_token, out.student_entropy, out.teacher_entropy, out.agreement]
        return out.loss, rows, mass


class _CrossEntropy:
    """Of the tokens that are there, which are the teacher's."""

    names = ("cross_entropy", "student_entropy")
    reads = None

    def __init__(self, config: LossConfig, classes: Vocabulary) -> None:
        self._config, self._classes = config, classes
        if not classes.same_tokens:
            raise ConfigError(
                "loss.divergence: got 'cross_entropy', must be a divergence where student and "
                "teacher have other tokenizers"
            )

    def loss(self, hidden: Tensor, student: Head, laid_out: Sequences, of_teacher: Any) -> Found:
        # The token that row t predicts is the next one of its sequence.
        tokens = laid_out.ids.flatten()[laid_out.rows + 1]
        out = cross_entropy(hidden, student, tokens, self._classes.classes, self._config)
        loss = -(out.logprob * laid_out.weights).sum()
        return loss, [-out.logprob, out.entropy], (0.0, 0.0, 0)
