"""Divergence between a student and a teacher known only by its top-k log-probabilities, from the
student's hidden states, without ever holding the [T, V] logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.arguments import (
    FLOATS,
    REDUCTIONS,
    Head,
    can_read_values,
    check_head,
    check_tensor,
    checked_token_weights,
    checked_transform,
    is_dtensor,
    one_of,
)
from esr_kernels.common.reduction import reduce_rows
from esr_kernels.scoring import reference
from esr_kernels.scoring.selected import NO_CLASS, select_classes

DIVERGENCES = ("forward_kl", "reverse_kl")
TAILS = ("bucket", "renormalise")


class TopkDivergence(NamedTuple):
    """What `linear_topk_divergence` returns. All but `loss` are [T], fp32 and detached.

    The entries of rows of weight 0 are 0.
    """

    loss: Tensor  # scalar, or [T] with reduction="none"; differentiable
    per_token: Tensor  # the divergence of each token, unweighted, in nats
    student_mass: Tensor  # the student's probability of the teacher's top-k
    student_lse: Tensor  # log-sum-exp of the transformed logits


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
    memory_budget: int | None = None,
    impl: str = "auto",
) -> TopkDivergence:
    """Divergence from the student to a teacher of which the top-k log-probabilities are known.

    With p = softmax(f(h W^T + b)), f as in `linear_divergence`, and tail="bucket", all classes but
    the K ids form one, whose teacher mass is q_t = 1 - sum exp(logprobs) and whose student mass is
    p_t = 1 - sum_k p_k. The divergence is a true KL on K + 1 classes, never negative, and a lower
    bound of the one over the vocabulary; its gradient reaches every class:

                     value                                    dz, class k      dz, any other v
        forward_kl   sum_c q_c (log q_c - log p_c)            p_k - q_k        p_v (1 - q_t / p_t)
        reverse_kl   sum_c p_c G_c, G_c = log p_c - log q_c   p_k (G_k - KL)   p_v (G_t - KL)

    With tail="renormalise" both are restricted to the K ids and scaled to sum 1: the same without
    a tail. This ignores how much probability the student gives to other classes.

    Args:
        student_hidden: [T, Ds] and `student_weight` [V, Ds], of the same dtype (or autocast to it).
        teacher_ids: [T, K] int64, 1 <= K <= V, distinct in a row, in any order; -1 where a row has
            fewer than K.
        teacher_logprobs: [T, K], natural logarithms of the teacher's probabilities of these ids
            over its whole vocabulary. They get no gradient. A mass above 1 by rounding is scaled to
            1. "renormalise" takes any scores that differ from them by a constant.
        divergence: "forward_kl" KL(q||p) or "reverse_kl" KL(p||q), which is infinite where the
            teacher gives an id the log-probability -inf.
        tail: "bucket" or "renormalise", above. A row without ids has divergence 0.
        token_weights: [T] float weights, None for all 1; finite (checked on the CPU), of either
            sign. A row of weight 0 contributes exactly 0, even if it is NaN; on CPU it is not
            computed.
        bias, softcap, logit_scale, temperature, num_classes: of the student, as in `token_logprob`.
            The teacher's log-probabilities are taken as they are.
        reduction: "sum", "mean" (by total weight) or "none" ([T], any upstream gradient).
        memory_budget: bytes of logits, and of their gradient where that is kept apart, that may
            exist at once; None takes `default_memory_budget(device)`.
        impl: "auto" (Triton on GPU, PyTorch on CPU), "torch", "triton", or "reference" (plain
            PyTorch with autograd and all logits held).

    Returns:
        `TopkDivergence`; only `loss` carries a gradient, to student_hidden, student_weight, bias.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed. Values of ids
            and log-probabilities are checked on CPU only. On GPU, where reading them would
            synchronise, an id out of range gives NaN in its row, and a repeated id an undefined
            divergence of its row.

    Exactness: fp32 logits and reductions; the student's tail is summed over its classes, not taken
        from 1. On GPU dz is rounded to the operands' dtype for the gradient GEMMs. Repeated calls
        agree bit for bit. NaN in a row stays in that row's outputs, but reaches the whole weight
        gradient. If the K ids of a teacher have a mass of 1 within rounding, its tail is as
        large as the rounding of its log-probabilities.
    Memory: a tile of logits [T, tile] and a few [T, K]; in the backward an fp32 gradient of
        `student_hidden` besides.
    Gradients: the backward projects again ("renormalise" does not need to); any number of
        backwards, no double backward.
    Reference: `esr_kernels.scoring.reference.linear_topk_divergence`.

    Example:
        >>> out = linear_topk_divergence(hidden, lm_head.weight, top.indices, top.values)
        >>> out.loss.backward()
    """
    one_of("divergence", divergence, DIVERGENCES)
    one_of("tail", tail, TAILS)
    one_of("reduction", reduction, REDUCTIONS)
    transform = checked_transform(
        ("logit_scale", logit_scale), ("softcap", softcap), ("temperature", temperature)
    )
    if is_dtensor(student_hidden, student_weight, bias):
        from esr_kernels.common.sharded import gathered_head  # Slow to import.

        names = "student_hidden", "student_weight", "bias"
        student_hidden, student_weight, bias, _ = gathered_head(
            names, student_hidden, student_weight, bias
        )
    head = check_head(
        "student_", student_hidden, student_weight, bias, transform, num_classes, impl
    )
    _check_teacher(teacher_ids, teacher_logprobs, tail, head)
    weights = checked_token_weights(token_weights, head.hidden)
    dtype = matmul.logits_dtype(head.hidden.dtype)
    if impl == "reference":
        with matmul.plain_precision(head.hidden):
            fields = reference.linear_topk_divergence(
                head.hidden,
                head.weight,
                teacher_ids,
                teacher_logprobs,
                divergence=divergence,
                tail=tail,
                token_weights=weights,
                bias=bias,
                softcap=softcap,
                logit_scale=logit_scale,
                temperature=temperature,
                num_classes=head.classes,
                reduction=reduction,
                dtype=dtype,
            )
        return TopkDivergence(**fields)
    live = None if weights is None else weights != 0
    selected = select_classes(
        head,
        teacher_ids,
        live,
        op="linear_topk_divergence",
        impl=impl,
        memory_budget=memory_budget,
    )
    # fp64 costs little for [T, K] numbers, and does not round the gradient.
    listed, others = selected.logits.double(), selected.unselected_lse.double()[:, None]
    with torch.no_grad():
        lse = torch.cat([listed, others], dim=1).logsumexp(dim=1)
        mass = (listed - lse[:, None]).exp().sum(dim=1)
    teacher_log_q = torch.where(
        teacher_ids == NO_CLASS, -torch.inf, teacher_logprobs.detach().double()
    )
    if tail == "bucket":
        log_p = torch.cat([listed, others], dim=1).log_softmax(dim=1)
        doubt = _rounding(teacher_log_q, teacher_logprobs.dtype)
        log_q = _with_tail(teacher_log_q, doubt, others.detach() > -torch.inf)
    else:
        empty = (teacher_log_q == -torch.inf).all(dim=1, keepdim=True)
        log_p = torch.where(empty, 0.0, listed).log_softmax(dim=1)
        log_q = torch.where(empty, 0.0, teacher_log_q).log_softmax(dim=1)
    values = (_kl(log_q, log_p) if divergence == "forward_kl" else _kl(log_p, log_q)).to(dtype)
    statistics = [values.detach().clone(), mass.to(dtype), (selected.top + lse).to(dtype)]
    if live is not None:
        statistics = [torch.where(live, field, 0.0) for field in statistics]
    return TopkDivergence(reduce_rows(values, weights, reduction), *statistics)


def _rounding(teacher_log_q: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounding error [T, 1] of the total mass of log-probabilities given in `dtype`.

    Rounding log q to `dtype` changes q in proportion to |log q|. The log-softmax before it, in at
    least fp32, has an absolute error, which is all that is left where log q is near 0.
    """
    q = teacher_log_q.exp()
    spread = -torch.where(q > 0, q * teacher_log_q, 0.0).sum(1, keepdim=True)
    computed_in = torch.promote_types(dtype, torch.float32)
    return 2 * (torch.finfo(dtype).eps * spread + torch.finfo(computed_in).eps)


def _with_tail(teacher_log_q: Tensor, doubt: Tensor, others_alive: Tensor) -> Tensor:
    """Log-probabilities [T, K + 1] of the K ids and of all other classes as one, normalised.

    If the K ids lack less than `doubt`, their rounding error, the tail gets a mass of `doubt`: 0
    would make a reverse KL infinite. If the student has no other class, the tail gets 0.
    """
    mass = teacher_log_q.exp().sum(1, keepdim=True)
    missing = 1 - mass
    tail = torch.where(missing > doubt, missing, torch.where(others_alive, doubt, 0.0))
    return torch.cat([teacher_log_q, tail.log()], dim=1) - (mass + tail).log()


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row, for log-probabilities that each sum to 1.

    sum(b - a) would be 0 if the normalisers were exact; adding it removes their first-order
    rounding error.
    """
    a, b = log_a.exp(), log_b.exp()
    live = a != 0  # NaN is, and reaches the gradient
    log_ratio = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    value = (a * log_ratio + (b - a)).sum(1)
    # A value that rounding makes negative is returned as 0, with its gradient.
    return torch.where(value < 0, value - value.detach(), value)


def _check_teacher(ids: Tensor, logprobs: Tensor, tail: str, head: Head) -> None:
    rows = head.hidden.shape[0]
    check_tensor("teacher_ids", ids, dtypes=(torch.int64,), shape=(rows, "K"), like=head.hidden)
    if ids.shape[1] == 0:
        raise ValueError("teacher_ids must have at least one column, got K = 0")
    check_tensor("teacher_logprobs", logprobs, dtypes=FLOATS, shape=tuple(ids.shape), like=ids)
    if can_read_values(ids):
        _check_values(ids, logprobs, tail, head.classes)


def _check_values(ids: Tensor, logprobs: Tensor, tail: str, classes: int) -> None:
    """Raise on the first bad value; for CPU tensors, whose values need no synchronisation."""
    bad = (ids < NO_CLASS) | (ids >= classes)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"teacher_ids must be from 0 to {classes - 1}, or {NO_CLASS} where a row has fewer "
            f"than K, got {int(ids[row, column])} in row {row}"
        )
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_CLASS)
    if bool(twice.any()):
        row, column = (int(i) for i in twice.nonzero()[0])
        raise ValueError(
            f"teacher_ids must not repeat an id in a row, got {int(ordered[row, column])} twice "
            f"in row {row}"
        )
    if tail == "bucket":
        mass = torch.where(ids >= 0, logprobs.detach().double(), -torch.inf).exp().sum(1)
        allowed = 1 + max(1e-3, 8 * torch.finfo(logprobs.dtype).eps)
        if bool((mass > allowed).any()):
            row = int((mass > allowed).nonzero()[0, 0])
            raise ValueError(
                "teacher_logprobs must be log-probabilities, whose exponentials sum to at most 1 "
                f"in a row, got {float(mass[row]):.4g} in row {row}; scores need tail='renormalise'"
            )
