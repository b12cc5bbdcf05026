"""Log-probability of given tokens and entropy of their distributions, from hidden states, without
ever holding the [T, V] logits: scoring, and the policy-gradient form of on-policy distillation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from esr_kernels.common import matmul
from esr_kernels.common.arguments import (
    Head,
    can_read_values,
    check_head,
    check_tensor,
    checked_transform,
    is_dtensor,
)
from esr_kernels.scoring import reference
from esr_kernels.scoring.selected import NO_CLASS, select_classes

# The token id of positions to leave out, as in torch.nn.functional.cross_entropy.
IGNORE = -100
# Log-odds are clamped to it: the probability is 0 or 1 in every dtype, and 0 * inf does not arise.
_CERTAIN = 1000.0


class TokenLogprob(NamedTuple):
    """What `token_logprob` returns: each [T], fp32 (fp64 for fp64 operands), differentiable."""

    logprob: Tensor  # log p(token), nats
    entropy: Tensor  # of the whole distribution, nats
    lse: Tensor  # log-sum-exp of the transformed logits


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
    memory_budget: int | None = None,
    impl: str = "auto",
) -> TokenLogprob:
    """Log-probability of each row's token, and entropy of each row, from hidden states.

    With z = f(h W^T + b), f(x) = softcap * tanh(scale * x / softcap) / temperature, p = softmax(z):

        logprob = log p[token]      d logprob / dz = onehot(token) - p
        entropy = -sum p log p      d entropy / dz = -p (log p + entropy)
        lse     = log sum exp z     d lse / dz     = p

    Args:
        hidden: [T, D] and `weight` [V, D], of the same dtype (or autocast to the same).
        tokens: [T] int64 class ids; -100 leaves a position out: outputs 0, no gradient.
        bias: [V], trained if it requires a gradient. An entry of -inf removes a class, unless a
            softcap lifts it.
        softcap, logit_scale, temperature: the transform above; None is no soft-capping.
        num_classes: classes that exist, from 0; rows of the head beyond it are padding.
        memory_budget: bytes of logits, and of their gradient where that is kept apart, that may
            exist at once; None takes `default_memory_budget(device)`.
        impl: "auto" (Triton on GPU, PyTorch on CPU), "torch", "triton", or "reference" (plain
            PyTorch with autograd and all logits held).

    Returns:
        `TokenLogprob`; every field takes any upstream gradient, to hidden, weight and bias.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed. Ids are checked
            on CPU only; on GPU, where reading them would synchronise, an id out of range gives NaN.

    Exactness: logits and reductions are fp32 for operands of any dtype; a probability near 1
        keeps the digits of its distance from 1. On GPU dz is rounded to the operands' dtype for
        the gradient GEMMs. Repeated calls agree bit for bit. NaN in a row stays in that row's
        outputs, but reaches the whole weight gradient. A token of probability 0 has -inf.
    Memory: a tile of logits [T, tile] and a few floats a token; in the backward an fp32 gradient of
        `hidden` besides.
    Gradients: the backward projects again; any number of backwards, no double backward.
    Reference: `esr_kernels.scoring.reference.token_logprob`.

    Example:
        >>> scored = token_logprob(hidden, lm_head.weight, sampled)
        >>> (-(advantage * scored.logprob) - 0.01 * scored.entropy).mean().backward()
    """
    transform = checked_transform(
        ("logit_scale", logit_scale), ("softcap", softcap), ("temperature", temperature)
    )
    if is_dtensor(hidden, weight, bias):
        from esr_kernels.common.sharded import gathered_head  # Slow to import.

        names = "hidden", "weight", "bias"
        hidden, weight, bias, _ = gathered_head(names, hidden, weight, bias)
    head = check_head("", hidden, weight, bias, transform, num_classes, impl)
    _check_tokens(tokens, head)
    if impl == "reference":
        with matmul.plain_precision(head.hidden):
            fields = reference.token_logprob(
                head.hidden,
                head.weight,
                tokens,
                bias=bias,
                softcap=softcap,
                logit_scale=logit_scale,
                temperature=temperature,
                num_classes=head.classes,
                dtype=matmul.logits_dtype(head.hidden.dtype),
            )
        return TokenLogprob(**fields)
    live = tokens != IGNORE
    ids = torch.where(live, tokens, NO_CLASS)[:, None]
    selected = select_classes(
        head, ids, live, op="token_logprob", impl=impl, memory_budget=memory_budget
    )
    # fp64 costs little for a few numbers a token, and does not round the gradient.
    logit, lse, entropy, top = (field.double() for field in selected)
    logit = logit[:, 0]
    # Two classes, the token and all others: log p = -log(1 + e**-odds) is exact at both ends, and
    # so is its derivative, unlike p (1 - p). The entropy is that of the two classes plus, by the
    # chain rule, that among the others.
    odds = logit - lse
    finite = odds.clamp(-_CERTAIN, _CERTAIN)
    log_p, log_others = logsigmoid(finite), logsigmoid(-finite)
    others = log_others.exp()
    of_two = -(log_p.exp() * log_p + others * log_others)
    outputs = (
        logsigmoid(odds),
        of_two + others * entropy,
        top + torch.logaddexp(logit, lse),
    )
    dtype = selected.top.dtype
    return TokenLogprob(*(torch.where(live, output, 0.0).to(dtype) for output in outputs))


def _check_tokens(tokens: Tensor, head: Head) -> None:
    rows = head.hidden.shape[0]
    check_tensor("tokens", tokens, dtypes=(torch.int64,), shape=(rows,), like=head.hidden)
    if not can_read_values(tokens):
        return
    bad = (tokens != IGNORE) & ((tokens < 0) | (tokens >= head.classes))
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"tokens must be from 0 to {head.classes - 1}, or {IGNORE} to leave a position out, "
            f"got {int(tokens[at])} at position {at}"
        )
