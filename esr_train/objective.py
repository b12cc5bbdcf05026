"""The gradient of a step: its rollouts through both models, micro-batch by micro-batch.

objective = Objective(config, experiment, optimizer, forward)
sums = objective.backward(batch, teacher_prompts, seed, step, spans)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esr_train.config import Config, ConfigError
from esr_train.data import seed_from
from esr_train.experiment import Experiment
from esr_train.loss import (
    cross_entropy,
    divergence_from_hidden,
    select,
    shared_mass,
    token_weights,
)
from esr_train.metrics import PER_TOKEN, SHARED, Spans
from esr_train.micro_batches import micro_batches
from esr_train.models import Head, head, training_mode
from esr_train.optim import Optimizer
from esr_train.rollout import RolloutBatch
from esr_train.teacher import Sequences, hidden_rows

_OF_TOKENS = ("cross_entropy", "student_entropy")  # what PER_TOKEN is without a teacher


class Objective:
    """The loss of rollouts and its gradient, which is added to that of the student's parameters.

    Raises:
        ConfigError: the loss cannot be had of this pair of models.
    """

    def __init__(
        self,
        config: Config,
        experiment: Experiment,
        optimizer: Optimizer,
        forward: Callable[..., Any] | None,
    ) -> None:
        self.config, self.optimizer, self.forward = config, optimizer, forward
        self.student: Any = experiment.student.model
        self.teacher, self.alignment = experiment.teacher, experiment.alignment
        self.world = experiment.world
        self.classes = experiment.classes(config.loss)
        self.device = head(self.student).weight.device
        self.distils = config.loss.divergence != "cross_entropy"
        if not self.distils and not self.alignment.vocabulary.same_tokens:
            raise ConfigError(
                "loss.divergence: got 'cross_entropy', must be a divergence where student and "
                "teacher have other tokenizers"
            )

    def backward(
        self,
        batch: RolloutBatch,
        teacher_prompts: list[list[int]] | None,
        seed: int,
        step: int,
        spans: Spans,
    ) -> dict[str, float]:
        """Accumulate the gradient of the batch; returns its loss and sums over its tokens.

        Of several processes each is given the whole batch, computes its share, and has the sums.

        `teacher_prompts` has one for each response, None where they are the student's.
        """
        config = self.config
        comparable = self.alignment.comparable(batch)
        weights = token_weights(batch, config.loss, (seed, "window", step), comparable)
        rank, ranks = self.world.rank, self.world.size
        torch.manual_seed(seed_from(seed, "dropout", step, *([rank] if rank else [])))
        names = "trained_tokens", "loss", *(PER_TOKEN if self.distils else _OF_TOKENS)
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        # Of other tokenizers: what they share, summed over micro-batches, and their number.
        masses = torch.zeros(3, dtype=torch.float64, device=self.device)
        lockstep = self.world.lockstep
        for part in micro_batches(batch, teacher_prompts, config.optim, rank, ranks, lockstep):
            if len(part) == 0:  # the others have one more: row 0, with nothing to train on
                part, weights = torch.tensor([0]), torch.zeros_like(weights)
            prompts = None if teacher_prompts is None else [teacher_prompts[r] for r in part]
            some = batch.select(part)
            laid_out, read = self.alignment.pair(some, weights[part], prompts, self.device)
            if len(laid_out.rows) == 0 and not lockstep:
                continue
            if self.distils:
                with spans("teacher"):
                    teacher_hidden = self.teacher.hidden_rows(read)
            with spans("student"), training_mode(self.student):
                if self.distils:
                    loss_of = partial(self._divergence, laid_out, teacher_hidden)
                else:
                    loss_of = partial(self._cross_entropy, laid_out)
                loss, rows, mass = self.world.forward(loss_of)
                loss.backward()
            masses += masses.new_tensor(mass)
            of_part = [loss.double(), *(row.double().sum() for row in rows)]
            of_part.insert(0, sums.new_tensor(len(rows[0])))
            sums += torch.stack(of_part).detach()
        with spans("student"):
            self.world.sum_gradients(self.optimizer.masters.values())
            *totals, own, teachers, parts = self.world.total(torch.cat([sums, masses])).tolist()
        found = dict(zip(names, totals, strict=True))
        if not found["trained_tokens"]:  # AdamW leaves what has no gradient; zeros would move it
            self.optimizer.zero_grad()
        if comparable is not None and parts:
            shares = own / parts, teachers / parts
            found["aligned_share"] = int(comparable.sum()) / int(batch.lengths.sum())
            found |= dict(zip(SHARED, shares, strict=True))
        return found

    def _student(self, laid_out: Sequences) -> tuple[Tensor, Head]:
        """Hidden states [T, D] at the rows, and the head with the memory of its gradient."""
        hidden = hidden_rows(self.student, laid_out, self.forward)
        student = head(self.student)
        return hidden, replace(student, weight_grad=self.optimizer.weight_grad(student.weight))

    def _divergence(
        self, laid_out: Sequences, teacher_hidden: Tensor
    ) -> tuple[Tensor, list[Tensor], tuple[float, float, int]]:
        """Loss, PER_TOKEN of the trained rows, and where tokenizers differ the shared masses, 1."""
        hidden, student = self._student(laid_out)
        loss, teacher, weights = self.config.loss, self.teacher.head, laid_out.weights
        if loss.select_by:
            with torch.no_grad():
                plain = replace(student, weight_grad=None)
                signals = divergence_from_hidden(
                    hidden, plain, teacher_hidden, teacher, None, self.classes, loss
                )
            kept = select(signals, laid_out.rows // laid_out.ids.shape[1], loss)
            hidden, teacher_hidden, weights = hidden[kept], teacher_hidden[kept], weights[kept]
        out = divergence_from_hidden(
            hidden, student, teacher_hidden, teacher, weights, self.classes, loss
        )
        mass = 0.0, 0.0, 0
        if not self.classes.same_tokens and len(hidden):
            both = ((hidden, student, out.student_lse), (teacher_hidden, teacher, out.teacher_lse))
            own, teachers = (shared_mass(*of_model, loss) for of_model in both)
            mass = own, teachers, 1
        rows = [out.per_token, out.student_entropy, out.teacher_entropy, out.agreement]
        return out.loss, rows, mass

    def _cross_entropy(
        self, laid_out: Sequences
    ) -> tuple[Tensor, list[Tensor], tuple[float, float, int]]:
        """Loss, _OF_TOKENS of the rows, and no shared masses."""
        hidden, student = self._student(laid_out)
        # The token that row t predicts is the next one of its sequence.
        tokens = laid_out.ids.flatten()[laid_out.rows + 1]
        out = cross_entropy(hidden, student, tokens, self.classes.classes, self.config.loss)
        loss = -(out.logprob * laid_out.weights).sum()
        return loss, [-out.logprob, out.entropy], (0.0, 0.0, 0)
