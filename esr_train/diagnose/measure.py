"""What student and teacher say of every token of a text: divergences, entropies, ranks.

    values = token_values(student, teacher, texts, teacher_prompts, vocabulary)
    values.reverse_kl      # [B, N], NaN where a text has no token

Two exact passes of `linear_divergence` have all of it: KL(student || teacher), both entropies and
the student's log-prob of the text from one, KL(teacher || student) and the teacher's log-prob from
the other, with the models in each other's place. All at temperature 1, whatever the rollout or the
loss has.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esr_train.config import LossConfig
from esr_train.loss import divergence_from_hidden
from esr_train.models import Head, head
from esr_train.rollout import RolloutBatch
from esr_train.teacher import Teacher, hidden_rows, sequences
from esr_train.vocabulary import Vocabulary

_TOKENS = 4096  # of texts in a forward pass, padding included
_RANK_ROWS = 256  # rows whose logits exist at once


@dataclass(frozen=True)
class TokenValues:
    """Each [B, N] float64, NaN where a text has no token; nats at temperature 1."""

    reverse_kl: np.ndarray  # KL(student || teacher)
    forward_kl: np.ndarray  # KL(teacher || student)
    student_entropy: np.ndarray
    teacher_entropy: np.ndarray
    agreement: np.ndarray  # 1 where both models' most probable token is the same
    student_logprob: np.ndarray  # of the token that the text has
    teacher_logprob: np.ndarray
    token_rank: np.ndarray  # of that token under the teacher, 1 the most probable
    top_rank: np.ndarray  # of the student's most probable token under the teacher

    @property
    def log_ratio(self) -> np.ndarray:
        """|log p_student - log p_teacher| of the tokens of the text: what the paper plots."""
        return np.abs(self.student_logprob - self.teacher_logprob)

    def where(self, chosen: np.ndarray) -> TokenValues:
        """The values at positions [B, N] bool, NaN elsewhere."""
        return TokenValues(
            **{f.name: np.where(chosen, getattr(self, f.name), np.nan) for f in fields(self)}
        )


@torch.no_grad()
def token_values(
    student: Any,
    teacher: Teacher,
    texts: RolloutBatch,
    teacher_prompts: list[list[int]] | None,
    vocabulary: Vocabulary,
    impl: str = "auto",
) -> TokenValues:
    """Values of every token of `texts`, stops included.

    `teacher_prompts` [B]: what the teacher reads before each text, where that differs. With
    `vocabulary.merge` all ways to stop are one class; ranks are of tokens either way.
    """
    shape, names = texts.tokens.shape, [field.name for field in fields(TokenValues)]
    found = np.full((len(names), *shape), np.nan)
    device = teacher.head.weight.device
    inside = torch.arange(shape[1]) < texts.lengths[:, None]
    read = texts if teacher_prompts is None else replace(texts, prompts=teacher_prompts)
    longest = max(map(len, [*texts.prompts, *read.prompts])) + int(texts.lengths.max())
    config = LossConfig(divergence="reverse_kl", impl=impl)  # type: ignore[arg-type]
    for part in torch.arange(shape[0]).split(max(1, _TOKENS // longest)):
        weights = inside[part].float()
        labels = texts.tokens[part][inside[part]].to(device)
        hidden = hidden_rows(student, sequences(texts.select(part), weights, device))
        theirs = teacher.hidden_rows(sequences(read.select(part), weights, device))
        rows = _rows((hidden, head(student)), (theirs, teacher.head), labels, vocabulary, config)
        for row, values in zip(found, rows, strict=True):
            here = row[part.numpy()]
            here[inside[part].numpy()] = values.double().cpu().numpy()
            row[part.numpy()] = here
    return TokenValues(**dict(zip(names, found, strict=True)))


Side = tuple[Tensor, Head]  # hidden states [T, D] and the head that reads them


def _rows(
    student: Side, teacher: Side, labels: Tensor, vocabulary: Vocabulary, config: LossConfig
) -> tuple[Tensor, ...]:
    """The fields of `TokenValues` for rows of hidden states, each [T]."""
    merge = vocabulary.merge
    swapped = replace(vocabulary, merge=None if merge is None else merge[::-1])
    ours = divergence_from_hidden(*student, *teacher, None, vocabulary, config, labels)
    back = divergence_from_hidden(*teacher, *student, None, swapped, config, labels)
    ranks = [
        _ranks(student, teacher, rows, labels, vocabulary.classes)
        for rows in torch.arange(len(labels), device=labels.device).split(_RANK_ROWS)
    ]
    of_token, of_top = (torch.cat(parts) for parts in zip(*ranks, strict=True))
    return (
        ours.per_token,
        back.per_token,
        ours.student_entropy,
        ours.teacher_entropy,
        ours.agreement,
        -ours.cross_entropy,
        -back.cross_entropy,
        of_token,
        of_top,
    )


def _ranks(
    student: Side, teacher: Side, rows: Tensor, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Ranks under the teacher of the labels, and of the student's most probable classes."""
    scores = teacher[1].first(classes).logits(teacher[0][rows])
    top = student[1].first(classes).logits(student[0][rows]).argmax(1)
    ranks = []
    for token in (labels[rows], top):
        ranks.append(1 + (scores > scores.gather(1, token[:, None])).sum(1))
    return ranks[0], ranks[1]
