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

from esr_train.config import Config
from esr_train.criteria import criterion
from esr_train.data import seed_from
from esr_train.experiment import Experiment
from esr_train.loss import token_weights
from esr_train.metrics import SHARED, Spans
from esr_train.micro_batches import micro_batches
from esr_train.models import head, training_mode
from esr_train.optim import Optimizer
from esr_train.rollout import RolloutBatch
from esr_train.teacher import Sequences, hidden_rows


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
        self.criterion = criterion(config, experiment)
        self.device = head(self.student).weight.device

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
        names = "trained_tokens", "loss", *self.criterion.names
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
            of_teacher = None
            if self.criterion.reads is not None:
                with spans("teacher"):
                    of_teacher = self.criterion.reads(read)
            with spans("student"), training_mode(self.student):
                loss, rows, mass = self.world.forward(partial(self._loss, laid_out, of_teacher))
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

    def _loss(
        self, laid_out: Sequences, of_teacher: Any
    ) -> tuple[Tensor, list[Tensor], tuple[float, float, int]]:
        """What the criterion says of the student's hidden states [T, D] at the rows, and of its
        head with the memory of its gradient."""
        hidden = hidden_rows(self.student, laid_out, self.forward)
        student = head(self.student)
        student = replace(student, weight_grad=self.optimizer.weight_grad(student.weight))
        return self.criterion.loss(hidden, student, laid_out, of_teacher)
