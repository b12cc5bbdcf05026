"""Evaluation of a student on held-out problems: its answers and its divergence from the teacher.

The problems, the teacher's text and the sampling seeds are fixed, so all arms and seeds of a
comparison get the same questions.

Metrics, each a mean over problems or tokens:

greedy_accuracy          and other scores of the task's grader, of the greedy answers
sampled_accuracy         the same over `eval.samples` sampled answers a problem (avg@k)
pass_at_k                share of problems that at least one of k > 1 sampled answers solves
response_length, eos_rate    of the sampled answers
heldout_kl, heldout_reverse_kl, top1_agreement            on text that the teacher wrote
student_kl, student_reverse_kl, student_top1_agreement    on sampled answers of the student
    each also by position, such as heldout_kl_0_31, where `eval.position_bins` asks for it
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from esr_train.alignment import Alignment
from esr_train.config import (
    EVAL_PROBLEMS,
    Config,
    ConfigError,
    EvalConfig,
    LossConfig,
    ReportConfig,
)
from esr_train.data import TokenizedTask
from esr_train.loss import divergence_from_hidden
from esr_train.models import head
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.tasks import Problem, Task
from esr_train.teacher import Sequences, Teacher, hidden_rows
from esr_train.world import ONE, World

logger = logging.getLogger(__name__)

SEED = 0  # of the held-out problems and everything sampled on them
SHOWN = 4  # decoded answers kept per evaluation
_TOKENS = 4096  # of texts in a forward pass, padding included

Evaluation = tuple[dict[str, float], list[dict[str, Any]]]  # metrics, decoded answers
# A text as the student reads it, and the teacher's hidden states [T, D] at its rows.
_Scored = tuple[Sequences, Tensor]


def heldout_problems(task: Task, config: EvalConfig) -> list[Problem]:
    """The problems of evaluations: those of a test, or others of the held-out split to choose a
    learning rate on (`eval.validation`).

    Raises:
        ConfigError: the task has not so many, or no others.
    """
    there = task.count("heldout")
    count = config.problems or min(EVAL_PROBLEMS, there or EVAL_PROBLEMS)
    try:
        test = task.problems("heldout", count, SEED)
        if not config.validation:
            return test
        known = {problem.prompt for problem in test}
        more = min(2 * count, there or 2 * count)
        others = task.problems("heldout", more, SEED if there else SEED + 1)
    except ValueError as error:
        raise ConfigError(f"eval.problems: {error}") from error
    others = [problem for problem in others if problem.prompt not in known][:count]
    if not others:
        raise ConfigError(
            f"eval.problems: got {count}, all of the held-out ones that {task.name!r} has; with "
            "fewer, there are others to choose a learning rate on"
        )
    return others


class Evaluator:
    """Held-out problems, and the teacher's text on them, which is sampled at the first use."""

    def __init__(
        self,
        config: Config,
        student: PrefixRollout,
        teacher: Teacher,
        tokenized: TokenizedTask,
        alignment: Alignment,
        world: World = ONE,
    ) -> None:
        self.world = world
        self.config, self.student, self.teacher = config, student, teacher
        self.task, self.tokenizer = tokenized.task, tokenized.tokenizer
        self.alignment = alignment
        self.problems = heldout_problems(self.task, config.eval)
        self.prompts = [tokenized.ids(problem) for problem in self.problems]
        self.scored = self.problems[0].answer is not None
        own = [tokenized.teacher_ids(problem) for problem in self.problems]
        self.teacher_prompts = None if None in own else [ids for ids in own if ids]
        if config.eval.teacher_text and not alignment.vocabulary.same_tokens:
            raise ConfigError(
                f"eval.teacher_text: got {config.eval.teacher_text}, must be 0 where student and "
                "teacher have other tokenizers; eval.student_text measures on the student's text"
            )
        self._teacher_text: list[_Scored] | None = None
        self._warned = False
        student.check_fits(self.prompts, config.eval.max_new_tokens)
        texts = max(config.eval.teacher_text, config.eval.student_text, 1)
        teacher.rollout.check_fits(self.teacher_prompts or self.prompts, texts)

    def evaluate(self) -> Evaluation:
        """Metrics of the student with its present weights, and a few of its answers, decoded.

        If the task has no checkable answers, only those are sampled that are decoded or measured.
        """
        with self.world.whole(self.student.model), self.world.scoring():
            return self._evaluate()

    def _evaluate(self) -> Evaluation:
        greedy, sampled = self._answers()
        metrics: dict[str, float] = {}
        if self.scored:
            metrics |= self.world.from_main(lambda: self._scores(greedy, sampled))
        metrics["response_length"] = float(sampled.lengths.double().mean())
        metrics["eos_rate"] = float(sampled.finished_by_eos.double().mean())
        if self.config.eval.teacher_text:
            if self._teacher_text is None:
                self._teacher_text = self._write_teacher_text()
            metrics |= self._divergences(self._teacher_text, ("heldout_", "heldout_", ""))
        if self.config.eval.student_text:
            first = sampled.select(torch.arange(0, len(sampled.prompts), self.config.eval.samples))
            texts = self._score(first, self.config.eval.student_text)
            metrics |= self._divergences(texts, ("student_",) * 3)
        self._check_metric(metrics)
        shown = [
            {
                "prompt": self._prompt_text(row),
                "response": self._text(sampled, row * self.config.eval.samples),
            }
            for row in range(min(SHOWN, len(self.problems)))
        ]
        return metrics, shown

    def _check_metric(self, metrics: dict[str, float]) -> None:
        """Raise ConfigError if the report is about a metric that evaluations do not have; for the
        default, which a task without answers does not have, warn once."""
        wanted = self.config.report.metric
        if wanted in metrics:
            return
        if wanted != ReportConfig.model_fields["metric"].default:
            raise ConfigError(
                f"report.metric: got {wanted!r}, must be one that is evaluated here: "
                f"{', '.join(metrics)}"
            )
        if not self._warned:
            self._warned = True
            logger.warning(
                "report.metric: evaluations have no %r; they have %s", wanted, ", ".join(metrics)
            )

    def _answers(self) -> tuple[RolloutBatch, RolloutBatch]:
        """A greedy answer to each problem, and `eval.samples` sampled ones, next to each other.

        All come from one rollout: a step costs little more for more rows.
        """
        all_of_them = self.scored or self.config.eval.student_text
        prompts = self.prompts if all_of_them else self.prompts[:SHOWN]
        samples, count = self.config.eval.samples, len(prompts)
        rows = torch.arange(count * (1 + samples))
        temperature = torch.zeros(len(rows))
        temperature[count:] = self.config.rollout.temperature or 1.0
        # A problem's first sampled answer draws the same noise however many there are.
        problem, sample = rows[:-count] // samples, rows[:-count] % samples
        keys = torch.cat([rows[:count] + count, problem + 2 * count * sample])
        batch = self.world.generate(
            self.student,
            prompts + [prompt for prompt in prompts for _ in range(samples)],
            # Not several samples a prompt: some caches cannot be repeated.
            1,
            self.config.eval.max_new_tokens,
            temperature,
            (SEED, "evaluation"),
            row_keys=keys,
            **self.config.rollout.filters,
            max_tokens_in_flight=self.config.rollout.max_tokens_in_flight,
        )
        return batch.select(rows[:count]), batch.select(rows[count:])

    def _scores(self, greedy: RolloutBatch, sampled: RolloutBatch) -> dict[str, float]:
        samples = self.config.eval.samples
        metrics = {}
        for name, answers, each in (("greedy", greedy, 1), ("sampled", sampled, samples)):
            scores = [
                self.task.score(self.problems[row // each], self._text(answers, row)) or {}
                for row in range(len(answers.prompts))
            ]
            for key in scores[0]:
                metrics[f"{name}_{key}"] = sum(score[key] for score in scores) / len(scores)
            if each > 1:
                solved = torch.tensor([score["accuracy"] for score in scores]).view(-1, each)
                metrics[f"pass_at_{each}"] = float((solved == 1).any(1).double().mean())
        return metrics

    def _text(self, answers: RolloutBatch, row: int) -> str:
        text: str = self.tokenizer.decode(answers.response(row), skip_special_tokens=True)
        return text

    def _prompt_text(self, row: int) -> str:
        prompt = self.problems[row].prompt
        if isinstance(prompt, str):
            return prompt
        return "\n".join(content for _, content in prompt)

    @torch.no_grad()
    def _divergences(
        self, texts: list[_Scored], prefixes: tuple[str, str, str]
    ) -> dict[str, float]:
        """Mean per token of a text: KL(teacher || student), its reverse, agreement."""
        student = self.student.model
        edges = [0, *self.config.eval.position_bins]
        total = torch.zeros(len(edges), 4, dtype=torch.float64)
        for batch, teacher_hidden in texts:
            student_hidden = hidden_rows(student, batch)
            rows = [torch.ones(len(batch.rows), device=student_hidden.device)]
            for divergence in ("reverse_kl", "forward_kl"):
                # At temperature 1, whatever the training loss uses.
                out = divergence_from_hidden(
                    student_hidden,
                    head(student),
                    teacher_hidden,
                    self.teacher.head,
                    None,
                    self.alignment.vocabulary,
                    LossConfig(divergence=divergence, impl=self.config.loss.impl),
                )
                rows.insert(0, out.per_token)
            rows.insert(2, out.agreement)
            bins = torch.bucketize(
                batch.tokens, torch.tensor(edges[1:]).to(batch.tokens), right=True
            )
            sums = torch.stack([row.double() for row in rows], dim=1)
            total += torch.zeros_like(total).index_add(0, bins.cpu(), sums.cpu())
        total = self.world.total(total)
        names = [
            p + n for p, n in zip(prefixes, ("kl", "reverse_kl", "top1_agreement"), strict=True)
        ]
        metrics = _means(names, total.sum(0), "")
        if len(edges) > 1:
            for edge, after, sums in zip(edges, [*edges[1:], None], total, strict=True):
                metrics |= _means(
                    names, sums, f"_{edge}_" + ("end" if after is None else f"{after - 1}")
                )
        return metrics

    def _write_teacher_text(self) -> list[_Scored]:
        """Teacher samples at temperature 1, scored by the teacher."""
        prompts, length = self.teacher_prompts or self.prompts, self.config.eval.teacher_text
        text = self.world.generate(
            self.teacher.rollout,
            prompts,
            1,
            length,
            1.0,
            (SEED, "teacher text"),
            max_tokens_in_flight=self.config.rollout.max_tokens_in_flight,
        )
        return self._score(
            RolloutBatch(self.prompts, text.tokens, text.lengths, text.finished_by_eos), length
        )

    def _score(self, text: RolloutBatch, length: int) -> list[_Scored]:
        """The first `length` tokens of each text, with the teacher's hidden states, in batches:
        this process's share of the texts."""
        device, own = self.teacher.head.weight.device, self.teacher_prompts
        inside = torch.arange(text.tokens.shape[1]) < text.lengths.clamp(max=length)[:, None]
        comparable = self.alignment.comparable(text)
        weights = (inside if comparable is None else inside & comparable).float()
        longest = max(map(len, text.prompts)) + int(text.lengths.max())
        at_once = max(1, _TOKENS // longest)
        count, ranks, batches = len(text.prompts), self.world.size, []
        own_texts = torch.arange(self.world.rank, count, ranks)
        parts = list(own_texts.split(at_once)) if len(own_texts) else []
        if self.world.lockstep:  # the main process has the most
            most = -(-len(range(0, count, ranks)) // at_once)
            parts += [own_texts[:0]] * (most - len(parts))
        for part in parts:
            if len(part) == 0:  # others have one more: text 0, with nothing to measure
                part, weights = torch.tensor([0]), torch.zeros_like(weights)
            prompts = None if own is None else [own[row] for row in part.tolist()]
            student, teacher = self.alignment.pair(
                text.select(part), weights[part], prompts, device
            )
            batches.append((student, self.teacher.hidden_rows(teacher)))
        return batches


def _means(names: list[str], sums: Tensor, suffix: str) -> dict[str, float]:
    """Means of sums that end with their count; none for no tokens."""
    if not sums[-1]:
        return {}
    return {name + suffix: float(x / sums[-1]) for name, x in zip(names, sums, strict=False)}
