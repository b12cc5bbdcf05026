"""The distillation loss of a batch of rollouts: which tokens count, and how much.

loss = sum over responses b and tokens t of weight[b, t] * divergence(student, teacher)[b, t]
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels import LinearDivergence, linear_divergence
from esr_train.config import LossConfig
from esr_train.data import seed_from
from esr_train.models import Head
from esr_train.rollout import RolloutBatch
from esr_train.vocabulary import Vocabulary

_MASS_ROWS = 64


def token_weights(
    batch: RolloutBatch,
    config: LossConfig,
    seed_key: tuple[int | str, ...],
    comparable: Tensor | None = None,
) -> Tensor:
    """Weights [B, N] fp32, the denominator already divided out; 0 where a token is not trained on.

    `comparable` [B, N] bool: the tokens that can be trained on (`Alignment.comparable`).

    token       1 / trained tokens of the batch
    trajectory  1 / (responses x trained tokens of the response)
    fixed       1 / (responses x fixed_length)
    """
    trained = _window(batch, config, seed_key)
    if not config.train_on_eos:
        ended = batch.finished_by_eos.nonzero()[:, 0]
        trained[ended, batch.lengths[ended] - 1] = False
    if comparable is not None:
        trained &= comparable
    weights, count = trained.float(), len(batch.prompts)
    if config.denominator == "token":
        return weights / weights.sum().clamp(min=1)
    if config.denominator == "trajectory":
        return weights / (weights.sum(1, keepdim=True).clamp(min=1) * count)
    assert config.fixed_length is not None
    return weights / (count * config.fixed_length)


def _window(batch: RolloutBatch, config: LossConfig, seed_key: tuple[int | str, ...]) -> Tensor:
    """Tokens [B, N] bool of the part of each response that is trained on."""
    size = config.window_tokens
    if size is None:
        start, stop = torch.zeros_like(batch.lengths), batch.lengths
    else:
        slack = (batch.lengths - size).clamp(min=0)
        if config.window == "first":
            start = torch.zeros_like(slack)
        elif config.window == "last":
            start = slack
        elif config.window == "middle":
            start = slack // 2
        else:
            generator = torch.Generator().manual_seed(seed_from(*seed_key))
            start = (torch.rand(len(slack), generator=generator) * (slack + 1)).long()
        stop = torch.minimum(start + size, batch.lengths)
    token = torch.arange(batch.tokens.shape[1])
    return (token >= start[:, None]) & (token < stop[:, None])


def divergence_from_hidden(
    student_hidden: Tensor,
    student: Head,
    teacher_hidden: Tensor,
    teacher: Head,
    token_weights: Tensor | None,
    vocabulary: Vocabulary,
    config: LossConfig,
    labels: Tensor | None = None,
) -> LinearDivergence:
    """`linear_divergence` between two models' heads, over the classes that they share.

    `labels` [T] are classes whose cross-entropy is wanted beside it; the loss does not count them.
    """
    return linear_divergence(
        student_hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        divergence=config.divergence,
        token_weights=token_weights,
        temperature=config.temperature,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        student_logit_scale=student.scale,
        teacher_logit_scale=teacher.scale,
        num_classes=vocabulary.classes if vocabulary.same_tokens else None,
        student_ids=vocabulary.student_ids,
        teacher_ids=vocabulary.teacher_ids,
        merge_student_ids=None if vocabulary.merge is None else vocabulary.merge[0],
        merge_teacher_ids=None if vocabulary.merge is None else vocabulary.merge[1],
        labels=labels,
        reduction="sum",
        # The reference has autograd's gradients only.
        weight_grad=None if config.impl == "reference" else student.weight_grad,
        impl=config.impl,
    )


@torch.no_grad()
def shared_mass(hidden: Tensor, head: Head, lse: Tensor, config: LossConfig) -> float:
    """Mean share of a model's probability that the classes of a divergence have.

    `lse` [T] is the log-sum-exp over these classes. Measured on the first rows, since it takes the
    logits of the whole vocabulary.
    """
    logits = head.logits(hidden[:_MASS_ROWS]) / config.temperature
    return float((lse[:_MASS_ROWS] - logits.logsumexp(-1)).exp().mean())
