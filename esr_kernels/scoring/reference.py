"""`token_logprob` and `linear_topk_divergence` in plain PyTorch: their specification.

Gradients come from autograd, all logits are held, and the arithmetic is in `dtype`: fp64 where the
tests compare with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.common.reduction import reduce_rows
from esr_kernels.common.reference import entropy, kl, transformed_logits


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
    """The fields of `esr_kernels.TokenLogprob` by name."""
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
    return {
        "logprob": torch.where(live, chosen, 0.0),
        "entropy": torch.where(live, entropy(log_p), 0.0),
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
    """The fields of `esr_kernels.TopkDivergence` by name."""
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
        doubt = 2 * eps * entropy(log_q) + 2 * torch.finfo(summed_in).eps
        missing = 1 - log_q.exp().sum(-1)
        missing = torch.where(missing <= doubt, torch.where(alive, doubt, 0.0), missing)
        log_p = torch.cat([log_p, log_rest[:, None]], dim=1)
        log_q = torch.cat([log_q, missing.log()[:, None]], dim=1)
    has_ids = (log_q != -torch.inf).any(-1, keepdim=True)
    log_p = torch.where(has_ids, log_p, 0.0)
    log_q = torch.where(has_ids, log_q, 0.0)
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    log_q = (log_q - log_q.logsumexp(-1, keepdim=True)).to(dtype)
    per_token = kl(log_q, log_p) if divergence == "forward_kl" else kl(log_p, log_q)
    weights = torch.ones_like(per_token) if token_weights is None else token_weights.to(dtype)
    live = weights != 0
    return {
        "loss": reduce_rows(per_token, weights, reduction),
        "per_token": torch.where(live, per_token.detach(), 0.0),
        "student_mass": torch.where(live, mass, 0.0),
        "student_lse": torch.where(live, logits.detach().logsumexp(-1), 0.0),
    }
