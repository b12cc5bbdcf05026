"""Every public op in plain PyTorch with the public signature: the specification.

Gradients come from autograd, all logits are held, and the arithmetic runs in `dtype` (fp64 by
default: the oracle of the tests). Slow and large on purpose; use it to check, never to train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.divergences import JSD, Divergence, KLMix, resolve_divergence


def transformed_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    num_classes: int,
    dtype: torch.dtype,
) -> Tensor:
    """softcap * tanh(scale * (h W^T + b) / softcap) / temperature, over the first `num_classes`."""
    logits = hidden.to(dtype) @ weight[:num_classes].to(dtype).T
    if bias is not None:
        logits = logits + bias[:num_classes].to(dtype)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row; classes of probability 0 in `a` contribute 0 and no gradient."""
    live = log_a > -torch.inf
    gap = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    return (torch.where(live, log_a, -torch.inf).exp() * gap).sum(-1)


def divergence_of_log_probs(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The divergence of each row, written from its textbook formula and nothing shared."""
    if isinstance(divergence, KLMix):
        terms = [
            weight * _kl(*pair)
            for weight, pair in (
                (divergence.forward, (log_q, log_p)),
                (divergence.reverse, (log_p, log_q)),
            )
            if weight
        ]
        return torch.stack(terms).sum(0)
    if isinstance(divergence, JSD):
        beta = divergence.beta
        log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
        return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    raise TypeError(f"the reference has no formula for {divergence!r}")


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
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The fields of `esr_kernels.LinearDivergence` by name, computed the obvious way."""
    classes = num_classes or min(student_weight.shape[0], teacher_weight.shape[0])
    log_p = transformed_logits(
        student_hidden,
        student_weight,
        student_bias,
        scale=student_logit_scale,
        softcap=student_softcap,
        temperature=temperature,
        num_classes=classes,
        dtype=dtype,
    )
    with torch.no_grad():
        log_q = transformed_logits(
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            scale=teacher_logit_scale,
            softcap=teacher_softcap,
            temperature=temperature if teacher_temperature is None else teacher_temperature,
            num_classes=classes,
            dtype=dtype,
        )
    student_lse, teacher_lse = log_p.logsumexp(-1), log_q.logsumexp(-1)
    log_p, log_q = log_p - student_lse[:, None], log_q - teacher_lse[:, None]
    per_token = divergence_of_log_probs(log_p, log_q, resolve_divergence(divergence))
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.to(dtype)
    weighted = torch.where(weights != 0, weights * per_token, 0.0)
    if reduction == "none":
        loss = weighted
    elif reduction == "mean":
        total = weights.sum()
        loss = weighted.sum() / torch.where(total == 0, 1.0, total)
    else:
        loss = weighted.sum()
    live = weights != 0
    return {
        "loss": loss,
        "per_token": torch.where(live, per_token.detach(), 0.0),
        "student_entropy": torch.where(live, _entropy(log_p.detach()), 0.0),
        "teacher_entropy": torch.where(live, _entropy(log_q), 0.0),
        "student_lse": torch.where(live, student_lse.detach(), 0.0),
        "teacher_lse": torch.where(live, teacher_lse, 0.0),
        "agreement": torch.where(live, (log_p.argmax(-1) == log_q.argmax(-1)).to(dtype), 0.0),
    }


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
