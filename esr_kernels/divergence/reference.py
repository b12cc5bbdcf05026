"""Every public op in plain PyTorch with the public signature: the specification.

Gradients come from autograd, all logits are held, and the arithmetic runs in `dtype` (fp64 by
default: the oracle of the tests). Slow and large on purpose; use it to check, never to train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.divergence.losses import (
    JSD,
    Divergence,
    KLMix,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    resolve_divergence,
)


def transformed_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    classes: slice | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """softcap * tanh(scale * (h W^T + b) / softcap) / temperature, over `classes`."""
    logits = hidden.to(dtype) @ weight[classes].to(dtype).T
    if bias is not None:
        logits = logits + bias[classes].to(dtype)
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row; classes of probability 0 in `a` contribute 0 and no gradient."""
    live = log_a != -torch.inf  # NaN is
    gap = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    return (torch.where(live, log_a, -torch.inf).exp() * gap).sum(-1)


def _log(mixture: Tensor) -> Tensor:
    """Logarithm that passes no gradient, rather than NaN, to classes that both models lost."""
    live = mixture > 0
    return torch.where(live, torch.where(live, mixture, 1.0).log(), -torch.inf)


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
    p, q = log_p.exp(), log_q.exp()
    if isinstance(divergence, JSD):
        beta = divergence.beta
        log_m = _log(beta * q + (1 - beta) * p)
        return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    if isinstance(divergence, SkewForwardKL):
        return _kl(log_q, _log(divergence.alpha * q + (1 - divergence.alpha) * p))
    if isinstance(divergence, SkewReverseKL):
        return _kl(log_p, _log(divergence.alpha * p + (1 - divergence.alpha) * q))
    if isinstance(divergence, TotalVariation):
        return 0.5 * (p - q).abs().sum(-1)
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
    student_ids: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The fields of `esr_kernels.LinearDivergence` by name, computed the obvious way."""
    shared = slice(num_classes or min(student_weight.shape[0], teacher_weight.shape[0]))
    log_p = transformed_logits(
        student_hidden,
        student_weight,
        student_bias,
        scale=student_logit_scale,
        softcap=student_softcap,
        temperature=temperature,
        classes=shared if student_ids is None else student_ids,
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
            classes=shared if teacher_ids is None else teacher_ids,
            dtype=dtype,
        )
    student_lse, teacher_lse = log_p.logsumexp(-1), log_q.logsumexp(-1)
    log_p, log_q = log_p - student_lse[:, None], log_q - teacher_lse[:, None]
    per_token = divergence_of_log_probs(log_p, log_q, resolve_divergence(divergence))
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.to(dtype)
    cross_entropy = torch.zeros_like(per_token)
    if labels is not None:
        picked = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        cross_entropy = torch.where(labels == -100, 0.0, -picked)
    row = per_token + label_weight * cross_entropy if label_weight else per_token
    weighted = torch.where(weights != 0, weights * row, 0.0)
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
        "cross_entropy": torch.where(live, cross_entropy.detach(), 0.0),
        "student_entropy": torch.where(live, _entropy(log_p.detach()), 0.0),
        "teacher_entropy": torch.where(live, _entropy(log_q), 0.0),
        "student_lse": torch.where(live, student_lse.detach(), 0.0),
        "teacher_lse": torch.where(live, teacher_lse, 0.0),
        "agreement": torch.where(live, (log_p.argmax(-1) == log_q.argmax(-1)).to(dtype), 0.0),
    }


def _entropy(log_p: Tensor) -> Tensor:
    return -torch.where(log_p != -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)


def token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The fields of `esr_kernels.TokenLogprob` by name, computed the obvious way."""
    logits = transformed_logits(
        hidden,
        weight,
        bias,
        scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        classes=slice(num_classes or weight.shape[0]),
        dtype=dtype,
    )
    log_p = logits.log_softmax(-1)
    live = tokens != -100
    chosen = log_p.gather(1, torch.where(live, tokens, 0)[:, None])[:, 0]
    possible = log_p > -torch.inf
    entropy = -(log_p.exp() * torch.where(possible, log_p, 0.0)).sum(-1)
    return {
        "logprob": torch.where(live, chosen, 0.0),
        "entropy": torch.where(live, entropy, 0.0),
        "lse": torch.where(live, logits.logsumexp(-1), 0.0),
    }


def linear_topk_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    num_classes: int | None = None,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """The fields of `esr_kernels.TopkDivergence` by name, computed the obvious way."""
    logits = transformed_logits(
        student_hidden,
        student_weight,
        bias,
        scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        classes=slice(num_classes or student_weight.shape[0]),
        dtype=dtype,
    )
    padding = teacher_ids == -1
    log_q = torch.where(padding, -torch.inf, teacher_logprobs.detach().double())
    log_all = logits.log_softmax(-1)
    log_p = torch.where(padding, -torch.inf, log_all.gather(1, teacher_ids.clamp(min=0)))
    mass = log_p.detach().exp().sum(-1)
    if tail == "bucket":
        listed = torch.zeros_like(logits)
        listed = listed.scatter_add(1, teacher_ids.clamp(min=0), (~padding).to(dtype))
        others = torch.where(listed > 0, -torch.inf, log_all)
        alive = (others > -torch.inf).any(-1)
        log_rest = torch.where(alive[:, None], others, 0.0).logsumexp(-1)
        log_rest = torch.where(alive, log_rest, -torch.inf)
        # The teacher's tail, known to about the rounding of its log-probabilities.
        eps = torch.finfo(teacher_logprobs.dtype).eps
        summed_in = torch.promote_types(teacher_logprobs.dtype, torch.float32)
        doubt = 2 * eps * _entropy(log_q) + 2 * torch.finfo(summed_in).eps
        missing = 1 - log_q.exp().sum(-1)
        missing = torch.where(missing <= doubt, torch.where(alive, doubt, 0.0), missing)
        log_p = torch.cat([log_p, log_rest[:, None]], dim=1)
        log_q = torch.cat([log_q, missing.log()[:, None]], dim=1)
    has_ids = (log_q != -torch.inf).any(-1, keepdim=True)
    log_p = torch.where(has_ids, log_p, 0.0)
    log_q = torch.where(has_ids, log_q, 0.0)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    log_q = (log_q - log_q.logsumexp(-1, keepdim=True)).to(dtype)
    per_token = _kl(log_q, log_p) if divergence == "forward_kl" else _kl(log_p, log_q)
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.to(dtype)
    live = weights != 0
    weighted = torch.where(live, weights * per_token, 0.0)
    if reduction == "none":
        loss = weighted
    elif reduction == "mean":
        total = weights.sum()
        loss = weighted.sum() / torch.where(total == 0, 1.0, total)
    else:
        loss = weighted.sum()
    return {
        "loss": loss,
        "per_token": torch.where(live, per_token.detach(), 0.0),
        "student_mass": torch.where(live, mass, 0.0),
        "student_lse": torch.where(live, logits.detach().logsumexp(-1), 0.0),
    }
