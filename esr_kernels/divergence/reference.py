"""`linear_divergence` in plain PyTorch with the public signature: its specification.

Gradients come from autograd, all logits are held, and the arithmetic runs in `dtype`: fp64 by
default, which the tests compare with. For checking, not for training: it is slow and needs memory
for [T, V] logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esr_kernels.common.reduction import reduce_rows
from esr_kernels.common.reference import entropy, kl, transformed_logits
from esr_kernels.divergence.losses import (
    JSD,
    Divergence,
    KLMix,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    resolve_divergence,
)


def _log(mixture: Tensor) -> Tensor:
    """Logarithm whose gradient is 0, not NaN, at classes of probability 0 under both models."""
    live = mixture > 0
    return torch.where(live, torch.where(live, mixture, 1.0).log(), -torch.inf)


def divergence_of_log_probs(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The divergence of each row, from its textbook formula, without code of `losses`.

    A divergence that has no formula here is the sum of its summands, so that autograd checks its
    pull.
    """
    if isinstance(divergence, KLMix):
        terms = [
            weight * kl(*pair)
            for weight, pair in (
                (divergence.forward, (log_q, log_p)),
                (divergence.reverse, (log_p, log_q)),
            )
            if weight
        ]
        return torch.stack(terms).sum(0)
    p, q = log_p.exp(), log_q.exp()
    if isinstance(divergence, JSD):
        beta = divergence.beta
        log_m = _log(beta * q + (1 - beta) * p)
        return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    if isinstance(divergence, SkewForwardKL):
        return kl(log_q, _log(divergence.alpha * q + (1 - divergence.alpha) * p))
    if isinstance(divergence, SkewReverseKL):
        return kl(log_p, _log(divergence.alpha * p + (1 - divergence.alpha) * q))
    if isinstance(divergence, TotalVariation):
        return 0.5 * (p - q).abs().sum(-1)
    exists = (log_p > -torch.inf) | (log_q > -torch.inf)
    log_ratio = torch.where(exists, log_q, 0.0) - torch.where(exists, log_p, 0.0)
    return divergence.summand(p, q, log_ratio).sum(-1)


def _rows(ids: Tensor | None, shared: int, weight: Tensor) -> Tensor:
    """The row of the head of each shared class."""
    return torch.arange(shared, device=weight.device) if ids is None else ids


def _is_member(rows: Tensor, merged: Sequence[int]) -> Tensor:
    return torch.isin(rows, torch.tensor(merged, device=rows.device))


def _event_logits(
    model: tuple[Tensor, Tensor, Tensor | None],
    rows: Tensor,
    merged: Sequence[int] | None,
    **transform: Any,
) -> Tensor:
    """Logits [T, events]: those of the shared classes, or of those not merged and then the merged
    class, whose logit is a log-sum-exp."""
    if merged is None:
        return transformed_logits(*model, classes=rows, **transform)
    rows = rows[~_is_member(rows, merged)]
    members = torch.tensor(merged, device=rows.device)
    one = transformed_logits(*model, classes=members, **transform).logsumexp(1, keepdim=True)
    return torch.cat([transformed_logits(*model, classes=rows, **transform), one], dim=1)


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence | str = "reverse_kl",
    *,
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    num_classes: int | None = None,
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    merge_student_ids: Sequence[int] | None = None,
    merge_teacher_ids: Sequence[int] | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The fields of `esr_kernels.LinearDivergence` by name, computed the obvious way."""
    shared = num_classes or min(student_weight.shape[0], teacher_weight.shape[0])
    log_p = _event_logits(
        (student_hidden, student_weight, student_bias),
        _rows(student_ids, shared, student_weight),
        merge_student_ids,
        scale=student_logit_scale,
        softcap=student_softcap,
        temperature=temperature,
        dtype=dtype,
    )
    with torch.no_grad():
        rows = _rows(teacher_ids, shared, teacher_weight)
        log_q = _event_logits(
            (teacher_hidden, teacher_weight, teacher_bias),
            rows,
            merge_teacher_ids,
            scale=teacher_logit_scale,
            softcap=teacher_softcap,
            temperature=temperature if teacher_temperature is None else teacher_temperature,
            dtype=dtype,
        )
    student_lse, teacher_lse = log_p.logsumexp(-1), log_q.logsumexp(-1)
    log_p, log_q = log_p - student_lse[:, None], log_q - teacher_lse[:, None]
    per_token = divergence_of_log_probs(log_p, log_q, resolve_divergence(divergence))
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.to(dtype)
    cross_entropy = torch.zeros_like(per_token)
    if labels is not None:
        event = labels.clamp(min=0)
        if merge_teacher_ids is not None:
            kept = ~_is_member(rows, merge_teacher_ids)
            event = torch.where(kept, kept.cumsum(0) - 1, kept.sum())[event]
        at_label = log_p.gather(1, event[:, None])[:, 0]
        cross_entropy = torch.where(labels == -100, 0.0, -at_label)
    row = per_token + label_weight * cross_entropy if label_weight else per_token
    live = weights != 0
    return {
        "loss": reduce_rows(row, weights, reduction),
        "per_token": torch.where(live, per_token.detach(), 0.0),
        "cross_entropy": torch.where(live, cross_entropy.detach(), 0.0),
        "student_entropy": torch.where(live, entropy(log_p.detach()), 0.0),
        "teacher_entropy": torch.where(live, entropy(log_q), 0.0),
        "student_lse": torch.where(live, student_lse.detach(), 0.0),
        "teacher_lse": torch.where(live, teacher_lse, 0.0),
        "agreement": torch.where(live, (log_p.argmax(-1) == log_q.argmax(-1)).to(dtype), 0.0),
    }
