"""The distillation loss of a batch of rollouts: which tokens count, and how much.

loss = sum over responses b and tokens t of weight[b, t] * divergence(student, teacher)[b, t]

or, for divergence=cross_entropy, of weight[b, t] * -log student(token[b, t]).
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels import LinearDivergence, TokenLogprob, linear_divergence, token_logprob
from esr_kernels.divergence.losses import resolve_divergence
from esr_train.config import ConfigError, LossConfig
from esr_train.data import seed_from
from esr_train.models import Head
from esr_train.rollout import RolloutBatch
from esr_train.vocabulary import Vocabulary

_MASS_ROWS = 64


def check_divergence(config: LossConfig) -> None:
    """Raise ConfigError if `divergence` is none."""
    if config.divergence != "cross_entropy":
        try:
            resolve_divergence(config.divergence)
        except ValueError as error:
            raise ConfigError(f"loss.divergence: {error}") from error


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

    With window=selected all tokens that may be selected have their weight, and `select` leaves
    `window_tokens` of each response: the trained tokens of the denominator are those.
    """
    trained = _window(batch, config, seed_key)
    if not config.train_on_eos:
        ended = batch.finished_by_eos.nonzero()[:, 0]
        trained[ended, batch.lengths[ended] - 1] = False
    if comparable is not None:
        trained &= comparable
    of_response, count = trained.sum(1, keepdim=True), len(batch.prompts)
    if config.window == "selected":
        of_response = of_response.clamp(max=config.window_tokens)
    weights = trained.float()
    if config.denominator == "token":
        return weights / of_response.sum().clamp(min=1)
    if config.denominator == "trajectory":
        return weights / (of_response.clamp(min=1) * count)
    assert config.fixed_length is not None
    return weights / (count * config.fixed_length)


def _window(batch: RolloutBatch, config: LossConfig, seed_key: tuple[int | str, ...]) -> Tensor:
    """Tokens [B, N] bool of the part of each response that is trained on."""
    size, token = config.window_tokens, torch.arange(batch.tokens.shape[1])
    inside = token < batch.lengths[:, None]
    if size is None or config.window == "selected":
        return inside
    generator = torch.Generator().manual_seed(seed_from(*seed_key))
    if config.window == "scattered":
        draws = torch.rand(inside.shape, generator=generator).masked_fill(~inside, 2.0)
        return inside & (draws.argsort(1).argsort(1) < size)
    slack = (batch.lengths - size).clamp(min=0)
    start = {
        "first": lambda: torch.zeros_like(slack),
        "last": lambda: slack,
        "middle": lambda: slack // 2,
        "random": lambda: (torch.rand(len(slack), generator=generator) * (slack + 1)).long(),
    }[config.window]()
    return inside & (token >= start[:, None]) & (token < start[:, None] + size)


def select(signals: LinearDivergence, response: Tensor, config: LossConfig) -> Tensor:
    """Rows [k] int64 that window=selected trains on, in their order: of each response the
    `window_tokens` with the largest signal, the earlier of equal ones.

    `response` [T] is the response of each row, ascending.
    """
    score = torch.ones_like(signals.per_token, dtype=torch.float64)
    for name in config.select_by:
        score *= signals.per_token if name == "divergence" else getattr(signals, name)
    # Sorted by response, and within it by falling score.
    order = score.argsort(descending=True, stable=True)
    order = order[response[order].argsort(stable=True)]
    start = torch.searchsorted(response, response)  # the first row of the same response
    rank = torch.arange(len(order), device=order.device) - start
    assert config.window_tokens is not None
    return order[rank < config.window_tokens].sort().values


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


def cross_entropy(
    hidden: Tensor, student: Head, tokens: Tensor, classes: int, config: LossConfig
) -> TokenLogprob:
    """Log-probs and entropies of tokens [T], those of the teacher's answer."""
    return token_logprob(
        hidden,
        student.weight,
        tokens,
        bias=student.bias,
        softcap=student.softcap,
        logit_scale=student.scale,
        temperature=config.temperature,
        num_classes=classes,
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
