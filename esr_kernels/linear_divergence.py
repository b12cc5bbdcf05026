"""Exact divergence between a student's and a teacher's next-token distributions, from their hidden
states and output heads, over the whole vocabulary, without ever holding the [T, V] logits."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels import gemm, reference, rows_torch
from esr_kernels.checks import Inputs, check_inputs
from esr_kernels.divergences import Divergence, resolve_divergence
from esr_kernels.execute import Call, Gradients, Heads, forward_only, recompute_gradients, stash
from esr_kernels.plan import Plan, Problem, make_plan
from esr_kernels.row_stats import RowSpec, RowStats


class LinearDivergence(NamedTuple):
    """What `linear_divergence` returns. All but `loss` are [T], fp32 and detached.

    The entries of rows of weight 0 are 0.
    """

    loss: Tensor  # scalar, or [T] with reduction="none"; differentiable
    per_token: Tensor  # the divergence of each token, unweighted, in nats
    student_entropy: Tensor  # nats, at the student's temperature
    teacher_entropy: Tensor
    student_lse: Tensor  # log-sum-exp of the transformed logits
    teacher_lse: Tensor
    agreement: Tensor  # 1 where both models' most probable class is the same


def _new_gradients(
    wanted: tuple[bool, ...], heads: Heads, whole_weight: Tensor
) -> tuple[Gradients, Gradients]:
    """Buffers for the gradients of the first three inputs: whole, and over the shared classes."""
    dtype = gemm.logits_dtype(heads.student_hidden.dtype)
    classes = heads.student_weight.shape[0]
    hidden = torch.empty_like(heads.student_hidden) if wanted[0] else None
    weight = torch.empty_like(whole_weight) if wanted[1] else None
    bias = None
    if wanted[2]:
        bias = torch.zeros(whole_weight.shape[0], dtype=dtype, device=whole_weight.device)
    if weight is not None:
        weight[classes:].zero_()
    shared = [hidden, *(None if g is None else g[:classes] for g in (weight, bias))]
    return [hidden, weight, bias], shared


def _normalised(
    row_weight: Tensor | None, tokens: int, reduction: str
) -> tuple[Tensor | None, float]:
    """(row weights or None for 1, common factor): the loss is factor * sum(weight * divergence).

    Scaling dz before it is rounded, rather than the gradients afterwards, spares them a rounding.
    """
    if reduction != "mean":
        return row_weight, 1.0
    if row_weight is None:
        return None, 1.0 / max(tokens, 1)
    total = row_weight.sum()
    return row_weight / torch.where(total == 0, torch.ones_like(total), total), 1.0


def _loss(values: Tensor, row_weight: Tensor | None, factor: float, reduction: str) -> Tensor:
    if row_weight is not None:
        values = torch.where(row_weight != 0, row_weight * values, 0)
    return values if reduction == "none" else values.sum() * factor


def _refuse_double_backward() -> None:
    # Autograd turns gradients on in a backward only for create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence has no double backward (create_graph=True); "
            "use impl='reference' for second derivatives"
        )


def _plain_precision(like: Tensor) -> torch.autocast:
    """Autocast off: the operands were cast at the boundary, and logits stay fp32 from there on."""
    return torch.autocast(like.device.type, enabled=False)


class _StashFunction(torch.autograd.Function):
    """Gradient in the forward pass; the backward scales it by the upstream scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, t_hidden, t_weight, t_bias, row_weight, call):  # type: ignore[no-untyped-def]
        heads = Heads(hidden, weight, bias, t_hidden, t_weight, t_bias).over(slice(call.classes))
        whole, shared = _new_gradients(ctx.needs_input_grad, heads, weight)
        row_weight, factor = _normalised(row_weight, hidden.shape[0], call.reduction)
        with _plain_precision(hidden):
            values, stats = stash(heads, row_weight, factor * call.spec.student.slope, call, shared)
        loss = _loss(values, row_weight, factor, call.reduction)
        ctx.save_for_backward(*whole)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.spent = False
        outputs = _detached(values, stats, row_weight)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        if upstream is None:
            return (None,) * 8
        _refuse_double_backward()
        if ctx.spent:
            raise RuntimeError(
                "linear_divergence with plan='stash' supports one backward pass: its gradient was "
                "scaled in place. Use plan='recompute' to backward twice through one graph"
            )
        ctx.spent = True
        gradients = ctx.saved_tensors
        # Reading the factor would stall a GPU; on CPU it spares a pass over the weight gradient.
        if upstream.device.type == "cuda" or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        hidden, weight, bias = gradients
        return hidden, weight, None if bias is None else bias.to(ctx.bias_dtype), *(None,) * 5


class _RecomputeFunction(torch.autograd.Function):
    """A few floats a token in between; the backward projects again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, t_hidden, t_weight, t_bias, row_weight, call):  # type: ignore[no-untyped-def]
        heads = Heads(hidden, weight, bias, t_hidden, t_weight, t_bias).over(slice(call.classes))
        with _plain_precision(hidden):
            values, stats, pull_sum = forward_only(heads, call)
        row_weight, factor = _normalised(row_weight, hidden.shape[0], call.reduction)
        loss = _loss(values, row_weight, factor, call.reduction)
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            t_hidden,
            t_weight,
            t_bias,
            row_weight,
            stats.student_lse,
            stats.teacher_lse,
            stats.lse_gap,
            pull_sum,
        )
        ctx.factor, ctx.call = factor * call.spec.student.slope, call
        outputs = _detached(values, stats, row_weight)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return loss, *outputs

    @staticmethod
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        if upstream is None:
            return (None,) * 8
        _refuse_double_backward()
        *operands, row_weight, student_lse, teacher_lse, lse_gap, pull_sum = ctx.saved_tensors
        whole_weight, bias = operands[1], operands[2]
        heads = Heads(*operands).over(slice(ctx.call.classes))
        factor = (upstream * ctx.factor).to(student_lse.dtype).expand_as(student_lse)
        if row_weight is not None:
            factor = factor * row_weight
        whole, shared = _new_gradients(ctx.needs_input_grad, heads, whole_weight)
        with _plain_precision(whole_weight):
            recompute_gradients(
                heads,
                ctx.call,
                student_lse,
                teacher_lse,
                lse_gap,
                pull_sum,
                factor.contiguous(),
                shared,
            )
        if whole[2] is not None:
            whole[2] = whole[2].to(bias.dtype)
        return *whole, *(None,) * 5


def _detached(values: Tensor, stats: RowStats, row_weight: Tensor | None) -> tuple[Tensor, ...]:
    outputs = (
        values,
        stats.student_entropy,
        stats.teacher_entropy,
        stats.student_lse,
        stats.teacher_lse,
        stats.agreement,
    )
    if row_weight is None:
        # The loss with reduction="none" may be `values` itself.
        return values.clone(), *outputs[1:]
    return tuple(torch.where(row_weight != 0, output, 0) for output in outputs)


def _rows_module(impl: str, device: torch.device) -> ModuleType:
    if impl == "torch" or (impl == "auto" and device.type == "cpu"):
        return rows_torch
    from esr_kernels import rows_triton

    return rows_triton


def _active_rows(token_weights: Tensor | None, compact: bool | None) -> Tensor | None:
    """Indices of the rows worth computing, or None for all of them.

    Counting them on a GPU would stall the host, so by default that is done only where it is free.
    """
    if token_weights is None or compact is False:
        return None
    if compact is None and token_weights.device.type != "cpu":
        return None
    live = token_weights != 0
    if bool(live.all()):
        return None
    return live.nonzero()[:, 0]


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
    plan: str | Plan = "auto",
    memory_budget: int | None = None,
    compact: bool | None = None,
    impl: str = "auto",
) -> LinearDivergence:
    """Exact divergence between student and teacher next-token distributions, from hidden states.

    With s = f_s(h_s W_s^T + b_s), t = f_t(h_t W_t^T + b_t) over the shared classes, p = softmax(s),
    q = softmax(t), and f(x) = softcap * tanh(scale * x / softcap) / temperature:

        loss = sum_i w_i D(p_i, q_i)            (reduction "sum"; "mean" divides by sum_i w_i)

    Args:
        student_hidden: [T, Ds], the states that the student's head is applied to.
        student_weight: [Vs, Ds], the student's head, same dtype (or autocast to the same).
        teacher_hidden: [T, Dt] and `teacher_weight` [Vt, Dt]: the same of the teacher, any Dt and
            dtype. No gradient ever flows to them.
        divergence: "forward_kl" KL(q||p), "reverse_kl" KL(p||q), "jsd", or an instance such as
            `JSD(beta=0.1)`. Beta follows GKD, TRL and Liger.
        token_weights: [T] float weights, None for all 1. A row of weight 0 contributes exactly 0,
            NaN or not, and is not computed where `compact` allows.
        temperature: divides both models' logits; `teacher_temperature` overrides the teacher's.
            The loss is not multiplied by temperature**2.
        student_bias: [Vs], trained if it requires a gradient; `teacher_bias` [Vt]. An entry of -inf
            removes a class.
        student_softcap, teacher_softcap: Gemma-2-style soft-capping of the logits, None for none.
        student_logit_scale, teacher_logit_scale: multiply the logits (Cohere, Granite).
        num_classes: classes that both models have, from 0; default min(Vs, Vt). Rows of the heads
            beyond it are padding: probability 0, gradient 0.
        reduction: "sum", "mean" (by total weight) or "none" ([T], any upstream gradient).
        plan: "auto", "stash", "recompute" or a `Plan` from `plan_linear_divergence`.
        memory_budget: bytes to use beyond inputs and gradients; None takes
            `default_memory_budget(device)`.
        compact: drop rows of weight 0 before the GEMMs. None does so when the weights lie on the
            CPU, where counting them needs no synchronisation; True always, False never.
        impl: "auto" (Triton on GPU, PyTorch on CPU), "torch", "triton", or "reference" (plain
            PyTorch with autograd and all logits held, in fp32).

    Returns:
        `LinearDivergence`; only `loss` carries a gradient, to student_hidden, student_weight and
        student_bias.

    Raises:
        ValueError or TypeError naming the argument, what it was and what is allowed.

    Exactness: logits, softmaxes and reductions are fp32 whatever the operands' dtype; the weight
        gradient accumulates in fp32. On GPU dz is rounded to the operands' dtype for the gradient
        GEMMs. Reductions have a fixed order: repeated calls agree bit for bit. An all-masked or
        empty batch gives loss 0 and zero gradients. NaN in a row stays in that row's outputs, but
        reaches the whole weight gradient.
    Memory: never [T, V]; `plan_linear_divergence` prints the peak.
    Gradients: computed in the forward with plan "stash" (one backward only), in the backward with
        "recompute" (any number). Neither supports double backward.
    Source: GKD (arXiv 2306.13649) for the divergences; the plans are derived in `plan.py`.

    Example:
        >>> out = linear_divergence(hidden, lm_head.weight, teacher_hidden, teacher_head.weight)
        >>> out.loss.backward()
    """
    resolved = resolve_divergence(divergence)
    inputs = check_inputs(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weights=token_weights,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        num_classes=num_classes,
        reduction=reduction,
        impl=impl,
    )
    if impl == "reference":
        return _reference(inputs, resolved, reduction)
    active = _active_rows(token_weights, compact)
    row_weight = inputs.row_weight
    hidden, t_hidden = inputs.student_hidden, inputs.teacher_hidden
    if active is not None:
        on_device = active.to(hidden.device)
        hidden, t_hidden = hidden[on_device], t_hidden[on_device]
        row_weight = None if row_weight is None else row_weight[on_device]
    spec = RowSpec(resolved, inputs.student_transform, inputs.teacher_transform)
    rows = _rows_module(impl, hidden.device)
    if not isinstance(plan, Plan):
        trains = torch.is_grad_enabled()
        problem = Problem(
            tokens=hidden.shape[0],
            classes=inputs.classes,
            student_dim=hidden.shape[1],
            teacher_dim=t_hidden.shape[1],
            hidden_dtype=hidden.dtype,
            weight_dtype=inputs.student_weight.dtype,
            device="cpu" if rows is rows_torch and hidden.device.type == "cpu" else "cuda",
            train_hidden=trains and hidden.requires_grad,
            train_weight=trains and inputs.student_weight.requires_grad,
            two_pass=resolved.kl_weights is None,
            per_token_gradient=reduction == "none",
        )
        plan = make_plan(problem, plan, memory_budget)
    call = Call(spec, plan, rows, inputs.classes, reduction)
    function = _StashFunction if plan.kind == "stash" else _RecomputeFunction
    loss, *per_token = function.apply(
        hidden,
        inputs.student_weight,
        inputs.student_bias,
        t_hidden.detach(),
        inputs.teacher_weight.detach(),
        None if inputs.teacher_bias is None else inputs.teacher_bias.detach(),
        row_weight,
        call,
    )
    if active is not None:
        tokens = student_hidden.shape[0]
        per_token = [_scatter(row, on_device, tokens) for row in per_token]
        if reduction == "none":
            loss = _scatter(loss, on_device, tokens)
    return LinearDivergence(loss, *per_token)


def _reference(inputs: Inputs, divergence: Divergence, reduction: str) -> LinearDivergence:
    fields = reference.linear_divergence(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden.detach(),
        inputs.teacher_weight.detach(),
        divergence,
        token_weights=inputs.row_weight,
        temperature=inputs.student_transform.temperature,
        teacher_temperature=inputs.teacher_transform.temperature,
        student_bias=inputs.student_bias,
        teacher_bias=None if inputs.teacher_bias is None else inputs.teacher_bias.detach(),
        student_softcap=inputs.student_transform.softcap,
        teacher_softcap=inputs.teacher_transform.softcap,
        student_logit_scale=inputs.student_transform.scale,
        teacher_logit_scale=inputs.teacher_transform.scale,
        num_classes=inputs.classes,
        reduction=reduction,
        dtype=gemm.logits_dtype(inputs.student_hidden.dtype),
    )
    return LinearDivergence(**fields)


def _scatter(row: Tensor, index: Tensor, tokens: int) -> Tensor:
    return row.new_zeros(tokens).index_put((index,), row)
