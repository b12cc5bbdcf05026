"""Evaluation of a student on held-out problems: its answers and its divergence from the teacher.

The problems, the teacher's text and the sampling seeds are fixed, so all arms and seeds of a
comparison have the same problems.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_train.config import Config, ConfigError, LossConfig
from esr_train.data import TokenizedTask
from esr_train.loss import divergence_from_hidden
from esr_train.models import head
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.teacher import Sequences, Teacher, hidden_rows, sequences

SEED = 0  # of the held-out problems and everything sampled on them
SHOWN = 4  # decoded answers kept per evaluation
_BATCH = 16  # teacher texts per forward pass

Evaluation = tuple[dict[str, float], list[dict[str, Any]]]  # metrics, decoded answers


class Evaluator:
    """Held-out problems, and the teacher's text on them, which is sampled at the first use."""

    def __init__(
        self, config: Config, student: PrefixRollout, teacher: Teacher, tokenized: TokenizedTask
    ) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.task, self.tokenizer = tokenized.task, tokenized.tokenizer
        try:
            self.problems = self.task.problems("heldout", config.eval.problems, SEED)
        except ValueError as error:  # more than the task has
            raise ConfigError(f"eval.problems: {error}") from error
        self.prompts = [tokenized.ids(problem) for problem in self.problems]
        self.scored = self.problems[0].answer is not None
        self._teacher_text: list[tuple[Sequences, Tensor]] | None = None
        limits = max(config.eval.max_new_tokens, config.eval.teacher_text)
        teacher.rollout.check_fits(self.prompts, limits)

    def evaluate(self) -> Evaluation:
        """Metrics of the student with its present weights, and a few of its answers, decoded.

        If the task has no checkable answers, only the few that are decoded are sampled.
        """
        greedy, sampled = self._answers()
        metrics: dict[str, float] = {}
        if self.scored:
            metrics["greedy_accuracy"] = self._accuracy(greedy)
            metrics["sampled_accuracy"] = self._accuracy(sampled)
        metrics["response_length"] = float(sampled.lengths.double().mean())
        metrics["eos_rate"] = float(sampled.finished_by_eos.double().mean())
        if self.config.eval.teacher_text:
            metrics |= self._divergences()
        shown = [
            {"prompt": problem.prompt, "response": self._text(sampled, row)}
            for row, problem in enumerate(self.problems[:SHOWN])
        ]
        return metrics, shown

    def _answers(self) -> tuple[RolloutBatch, RolloutBatch]:
        """Greedy and sampled answers from one rollout, whose steps cost little more for both."""
        prompts = self.prompts if self.scored else self.prompts[:SHOWN]
        rows = torch.arange(len(prompts))
        temperature = torch.zeros(2 * len(rows))
        temperature[len(rows) :] = self.config.rollout.temperature or 1.0
        batch = self.student.generate(
            prompts * 2,
            # Not two samples per prompt: the caches of some models cannot be repeated.
            1,
            self.config.eval.max_new_tokens,
            temperature,
            (SEED, "evaluation"),
            row_keys=torch.cat([rows + len(rows), rows]),
            **self.config.rollout.filters,
            max_tokens_in_flight=self.config.rollout.max_tokens_in_flight,
        )
        return batch.select(rows), batch.select(rows + len(rows))

    def _accuracy(self, answers: RolloutBatch) -> float:
        scores = [
            self.task.score(problem, self._text(answers, row))
            for row, problem in enumerate(self.problems)
        ]
        return sum(score or 0.0 for score in scores) / len(scores)

    def _text(self, answers: RolloutBatch, row: int) -> str:
        text: str = self.tokenizer.decode(answers.response(row), skip_special_tokens=True)
        return text

    @torch.no_grad()
    def _divergences(self) -> dict[str, float]:
        """Mean per token of the teacher's text: KL(teacher || student), its reverse, agreement."""
        if self._teacher_text is None:
            self._teacher_text = self._write_teacher_text()
        student = self.student.model
        # At temperature 1, also if the training loss has another.
        loss = LossConfig(impl=self.config.loss.impl)
        total = torch.zeros(4, dtype=torch.float64)
        for batch, teacher_hidden in self._teacher_text:
            student_hidden = hidden_rows(student, batch)
            heads = head(student), teacher_hidden, self.teacher.head, None, loss
            forward = divergence_from_hidden(student_hidden, *heads, "forward_kl")
            reverse = divergence_from_hidden(student_hidden, *heads, "reverse_kl")
            rows = (forward.per_token, reverse.per_token, forward.agreement)
            total[:3] += torch.stack([row.double().sum() for row in rows]).cpu()
            total[3] += len(batch.rows)
        kl, reverse_kl, agreement = (total[:3] / total[3]).tolist()
        return {"heldout_kl": kl, "heldout_reverse_kl": reverse_kl, "top1_agreement": agreement}

    def _write_teacher_text(self) -> list[tuple[Sequences, Tensor]]:
        """Teacher samples at temperature 1 and the teacher's hidden states on them, in batches."""
        device = self.teacher.head.weight.device
        length = self.config.eval.teacher_text
        text = self.teacher.rollout.generate(
            self.prompts,
            1,
            length,
            1.0,
            (SEED, "teacher text"),
            max_tokens_in_flight=self.config.rollout.max_tokens_in_flight,
        )
        batches = []
        for part in torch.arange(len(self.prompts)).split(_BATCH):
            ones = (torch.arange(length) < text.lengths[part, None]).float()
            batch = sequences(text.select(part), ones, device)
            batches.append((batch, self.teacher.hidden_rows(batch)))
        return batches
