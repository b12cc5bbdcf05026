"""Measuring a student on held-out problems: answers, and divergence from the teacher on its text.

The problems, the teacher's text and the sampling seeds are fixed, so every arm and every seed of a
comparison is asked the same questions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_train.config import Config, ConfigError, LossConfig
from esr_train.data import encode
from esr_train.loss import divergence_from_hidden
from esr_train.models import head
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.tasks import Task
from esr_train.teacher import Sequences, Teacher, hidden_rows, sequences

SEED = 0  # of the held-out problems and everything sampled on them
SHOWN = 4  # decoded answers kept per evaluation


class Evaluator:
    """Holds the questions, and the teacher's answers to them once they are needed."""

    def __init__(self, config: Config, teacher: Teacher, tokenizer: Any, task: Task) -> None:
        self.config, self.teacher, self.tokenizer, self.task = config, teacher, tokenizer, task
        try:
            self.problems = task.problems("heldout", config.eval.problems, SEED)
        except ValueError as error:  # more than the task has
            raise ConfigError(f"eval.problems: {error}") from error
        self.prompts = [encode(tokenizer, problem, task.chat) for problem in self.problems]
        self.scored = self.problems[0].answer is not None
        self._teacher_text: list[tuple[Sequences, Tensor]] | None = None
        limits = max(config.eval.max_new_tokens, config.eval.teacher_text)
        PrefixRollout(teacher.model, tokenizer).check_fits(self.prompts, limits)

    def evaluate(self, student: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics of the student as it is now, and a few of its answers, decoded.

        Where the task has no checkable answers, only the few that are shown are sampled.
        """
        metrics: dict[str, float] = {}
        if self.scored:
            metrics["greedy_accuracy"] = self._accuracy(self._answers(student, 0.0))
        sampled = self._answers(student, self.config.rollout.temperature or 1.0)
        if self.scored:
            metrics["sampled_accuracy"] = self._accuracy(sampled)
        metrics["response_length"] = float(sampled.lengths.double().mean())
        metrics["eos_rate"] = float(sampled.finished_by_eos.double().mean())
        if self.config.eval.teacher_text:
            metrics |= self._divergences(student)
        shown = [
            {"prompt": problem.prompt, "response": self._text(sampled, row)}
            for row, problem in enumerate(self.problems[:SHOWN])
        ]
        return metrics, shown

    def _answers(self, student: Any, temperature: float) -> RolloutBatch:
        prompts = self.prompts if self.scored else self.prompts[:SHOWN]
        length = self.config.eval.max_new_tokens
        key = (SEED, "evaluation")
        rollout = PrefixRollout(student, self.tokenizer, self._classes(student))
        return rollout.generate(prompts, 1, length, temperature, key)

    def _classes(self, student: Any) -> int:
        return min(head(student).weight.shape[0], self.teacher.head.weight.shape[0])

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
    def _divergences(self, student: Any) -> dict[str, float]:
        """Mean per token of the teacher's text: KL(teacher || student), its reverse, agreement."""
        if self._teacher_text is None:
            self._teacher_text = self._write_teacher_text(self._classes(student))
        # The models as they are: no temperature.
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

    def _write_teacher_text(self, classes: int) -> list[tuple[Sequences, Tensor]]:
        """Teacher samples at temperature 1 and the teacher's hidden states on them, in batches."""
        device = self.teacher.head.weight.device
        length = self.config.eval.teacher_text
        key = (SEED, "teacher text")
        rollout = PrefixRollout(self.teacher.model, self.tokenizer, classes)
        text = rollout.generate(self.prompts, 1, length, 1.0, key)
        batches = []
        for part in torch.arange(len(self.prompts)).split(16):
            ones = (torch.arange(length) < text.lengths[part, None]).float()
            batch = sequences(text.select(part), ones, device)
            batches.append((batch, self.teacher.hidden_rows(batch)))
        return batches
