"""Exact divergence between a student's and a teacher's next-token distributions over the whole
vocabulary, from hidden states and output heads, with logits within a byte budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.arguments import is_dtensor
from esr_kernels.common.rows import active_rows, to_device
from esr_kernels.divergence import reference
from esr_kernels.divergence.arguments import (
    Inputs,
    ModelArguments,
    Options,
    check_inputs,
    check_options,
    checked_transforms,
    repeated_inputs,
)
from esr_kernels.divergence.autograd import RecomputeFunction, StashFunction, Work
from esr_kernels.divergence.call import Call, Operands, Request, Wanted, key_of, remember, seen
from esr_kernels.divergence.losses import Divergence, resolve_divergence
from esr_kernels.divergence.plan import Plan
from esr_kernels.divergence.statistics import RowSpec


class LinearDivergence(NamedTuple):
    """The result of `linear_divergence`. All fields but `loss` are [T], fp32 and detached.

    The entries of rows of weight 0 are 0.
    """

    loss: Tensor  # scalar, or [T] with reduction="none"; differentiable
    per_token: Tensor  # the divergence of each token, unweighted, in nats
    cross_entropy: Tensor  # -log p(label); 0 without a label
    student_entropy: Tensor  # nats, at the student's temperature
    teacher_entropy: Tensor
    student_lse: Tensor  # log-sum-exp of the transformed logits
    teacher_lse: Tensor
    agreement: Tensor  # 1 where both models' most probable class is the same


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
    merge_student_ids: Sequence[int] | Tensor | None = None,
    merge_teacher_ids: Sequence[int] | Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    weight_grad: Tensor | None = None,
    reduction: str = "sum",
    plan: str | Plan = "auto",
    memory_budget: int | None = None,
    compact: bool | None = None,
    group: Any = None,
    impl: str = "auto",
) -> LinearDivergence:
    """Exact divergence between student and teacher next-token distributions, from hidden states.

    With s = f_s(h_s W_s^T + b_s), t = f_t(h_t W_t^T + b_t) over the shared classes, p = softmax(s),
    q = softmax(t), and f(x) = softcap * tanh(scale * x / softcap) / temperature:

        loss = sum_i w_i (D(p_i, q_i) - label_weight * log p_i[label_i])

    with reduction "sum"; "mean" divides it by sum_i w_i.

    Args:
        student_hidden: [T, Ds], the states that the student's head is applied to.
        student_weight: [Vs, Ds], the student's head, same dtype (or autocast to the same).
        teacher_hidden: [T, Dt] and `teacher_weight` [Vt, Dt]: those of the teacher, of any Dt and
            dtype. They get no gradient.
        divergence: "forward_kl" KL(q||p), "reverse_kl" KL(p||q), "jeffreys", "jsd",
            "skew_forward_kl", "skew_reverse_kl", "total_variation", or an instance such as
            `JSD(beta=0.1)` or `KLMix(0.2, 0.8)`. Beta follows GKD, TRL and Liger.
        token_weights: [T] float weights, None for all 1; finite, of either sign: a negative one
            leads away from the teacher. A row of weight 0 contributes exactly 0, even if it is NaN,
            and is not computed if `compact` allows that. A weight that is not finite raises on the
            CPU; on a GPU, where weights are not checked, the loss is NaN.
        temperature: divides both models' logits; `teacher_temperature` overrides the teacher's.
            The loss is not multiplied by temperature**2.
        student_bias: [Vs], trained if it requires a gradient; `teacher_bias` [Vt]. An entry of -inf
            removes a class.
        student_softcap, teacher_softcap: Gemma-2-style soft-capping of the logits, None for none.
        student_logit_scale, teacher_logit_scale: multiply the logits (Cohere, Granite).
        num_classes: classes that both models have, from 0; default min(Vs, Vt), with a warning (not
            in a compiled call) where the two differ by more than a tenth. Rows of the heads beyond
            it are padding: probability 0, gradient 0.
        student_ids, teacher_ids: [V] int64, for models that number the same strings differently:
            class c is row student_ids[c] of the student's head and teacher_ids[c] of the teacher's.
            All other rows have probability 0 and gradient 0. The ids must be distinct, which is
            checked on the CPU. Heads are gathered in strips, not copied as a whole.
        merge_student_ids, merge_teacher_ids: rows of the student's and of the teacher's head whose
            probabilities count as one class, such as all ways to end an answer: a coarsening of the
            events, so still a divergence. Distinct integers, or an int64 tensor on the CPU; given
            together. A class that both models have is in both groups or in neither; rows that are
            no shared class may be members, and their probability then counts. Entropies,
            log-sum-exps and agreement are those of the merged events; a label in the group means
            the merged class. Not with `group`. A map by `student_ids` is checked against the groups
            on the CPU; on a GPU, where nobody looks, a mismatch makes the loss NaN.
        labels: [T] int64 classes for a cross-entropy of weight `label_weight`, -100 for none. They
            count shared classes: with ids, they index `student_ids`. A label that is no class
            raises on the CPU; on a GPU, where labels are not checked, its loss is NaN.
        weight_grad: [Vs, Ds] fp32 (fp64 for fp64 operands), a buffer to which the backward adds the
            head's gradient without rounding, such as Megatron's `main_grad`. Autograd then gets no
            gradient for student_weight, even if that requires one. Plan "recompute" adds each tile
            in place; "stash" stores the gradient until the backward, which has the upstream factor.
        reduction: "sum", "mean" (by total weight) or "none" ([T], any upstream gradient).
        plan: "auto" (the cheapest within the budget; no stash for fp16 training, because a stash
            rounds gradients before the loss scale is known), "stash", "recompute", "fused" (a
            recompute whose forward is one Triton kernel, GPU only) or a `Plan` from
            `plan_linear_divergence` for the same classes, dims, dtypes and kind of device; the
            number of tokens may differ.
        memory_budget: bytes to use beyond inputs and gradients; None takes
            `default_memory_budget(device)`. Must be None with a `Plan`, whose chunks are fixed.
        compact: whether to drop rows of weight 0 before the GEMMs. None drops them if the weights
            are on the CPU, where counting them does not synchronise.
        group: a torch.distributed group over whose ranks the vocabulary is sharded. Each rank
            passes all tokens and its own rows of both heads, the same classes of both; shards may
            be uneven; `labels` are numbered within the rank that owns them, -1 for a label of
            another rank (-100 for none). Ranks exchange ten floats a token in the forward, and sum
            the hidden gradient in the backward. Takes the recompute plan.
        impl: "auto" (Triton on GPU; on CPU compiled C if there is a compiler, else PyTorch; PyTorch
            for a divergence without a kernel), "torch", "triton", or "reference" (plain PyTorch
            with autograd and all logits in memory, in fp32).

    Returns:
        `LinearDivergence`; only `loss` carries a gradient, to student_hidden, student_weight and
        student_bias.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed.

    Exactness: logits, softmaxes and reductions are fp32 for operands of any dtype; the weight
        gradient accumulates in fp32. fp32 operands are multiplied in full fp32, not in TF32, and
        sums of products are fp32, whatever `torch.backends.cuda.matmul` allows, in every plan. On
        GPU dz is rounded to the operands' dtype for the gradient GEMMs. A logit that overflows
        fp32 when it is scaled or divided by the temperature makes its row NaN, as in softmax.
        Reductions have a fixed order: repeated calls agree bit for bit. An all-masked or empty
        batch gives loss 0 and zero gradients. NaN in a row whose weight is not 0 stays in that
        row's outputs, but reaches the whole weight gradient.
    Memory: at most `memory_budget` beyond inputs and gradients; logits of all tokens and classes
        exist at once only if they fit it. The plan of `plan_linear_divergence` has the peak.
    Gradients: computed in the forward with plan "stash" (one backward only), in the backward with
        "recompute" (any number). Neither supports double backward.
    DTensors: a sharded `student_weight`, such as a parameter of FSDP2, and its bias are gathered
        once, in the dtype of `student_hidden` (of autocast where that is on); the backward
        reduces the gradient, in fp32, to its mean over the ranks, as FSDP2 does. `student_hidden`
        is then a plain tensor, this rank's own tokens, and every rank of the mesh makes the call.
        With a replicated DTensor as `student_hidden`, or with `group`, all ranks have the same
        tokens, and a head with Shard(0) stays where it is, as with `group` above; `num_classes`,
        `labels` and plain biases are then those of the whole vocabulary. The teacher's head may be
        a DTensor of any mesh and placements, and is gathered unless it is sharded like the
        student's. `weight_grad` is sharded as `student_weight` is. Not under torch.compile.
    torch.compile: a node of the graph, forward and backward, for any number of tokens up to a limit
        at which "auto" changes from a stash to a recompute. Numbers such as the temperature are
        constants of a graph: another value compiles again.
    Source: GKD (arXiv 2306.13649) for the divergences; the plans are derived in `plan.py`.

    Example:
        >>> out = linear_divergence(hidden, lm_head.weight, teacher_hidden, teacher_head.weight)
        >>> out.loss.backward()
    """
    shardable = (
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        token_weights,
        labels,
        num_classes,
        weight_grad,
        group,
    )
    if is_dtensor(*shardable):
        from esr_kernels.divergence import sharded  # Slow to import.

        mapped = student_ids is not None or teacher_ids is not None
        (
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            token_weights,
            labels,
            num_classes,
            weight_grad,
            group,
        ) = sharded.as_plain(sharded.Shardable(*shardable), mapped)
    per_token = token_weights, labels
    student_tensors = student_hidden, student_weight, student_bias
    teacher_tensors = teacher_hidden, teacher_weight, teacher_bias
    ids = student_ids, teacher_ids, merge_student_ids, merge_teacher_ids
    key = key_of(
        student_tensors + teacher_tensors,
        per_token,
        (*ids, weight_grad, group, compact or None),
        (
            divergence,
            temperature,
            teacher_temperature,
            student_softcap,
            teacher_softcap,
            student_logit_scale,
            teacher_logit_scale,
            num_classes,
            label_weight,
            reduction,
            plan,
            memory_budget,
            impl,
        ),
    )
    call = seen(key)
    if call is not None:
        x, row_weight = repeated_inputs(student_tensors, teacher_tensors, *per_token)
        return _run(call, None, row_weight, None, x)
    resolved = resolve_divergence(divergence)
    options = Options(
        token_weights,
        num_classes,
        labels,
        label_weight,
        merge_student_ids,
        merge_teacher_ids,
        weight_grad,
        reduction,
        plan,
        memory_budget,
        compact,
        group,
        impl,
    )
    check_options(options)
    transforms = checked_transforms(
        temperature,
        teacher_temperature,
        student_softcap,
        teacher_softcap,
        student_logit_scale,
        teacher_logit_scale,
    )
    student = ModelArguments(
        "student", student_hidden, student_weight, student_bias, student_ids, transforms[0]
    )
    teacher = ModelArguments(
        "teacher", teacher_hidden, teacher_weight, teacher_bias, teacher_ids, transforms[1]
    )
    inputs = check_inputs(student, teacher, options)
    if impl == "reference":
        return _reference(student, teacher, inputs, options, resolved)
    x = inputs.operands
    wanted = _wanted(x, weight_grad)
    # Counting rows synchronises a GPU, so by default it is done on the CPU only.
    if compact is None:
        compact = token_weights is not None and token_weights.device.type == "cpu"
    spec = RowSpec(resolved, *transforms, label_weight if labels is not None else 0.0)
    request = Request(
        spec, inputs.classes, reduction, plan, memory_budget, group, impl, inputs.merge
    )
    if torch.compiler.is_compiling():
        from esr_kernels.divergence.compiled import traced  # Registers operators when imported.

        return LinearDivergence(*traced(request, x, token_weights, weight_grad, compact, wanted))
    active = active_rows(token_weights, compact)
    if active is not None:
        active = to_device(active, x.student_hidden.device)
    tokens = x.student_hidden.shape[0] if active is None else active.shape[0]
    call = request.call(request.problem(x, tokens, wanted, weight_grad is not None))
    if active is None and not inputs.warned:
        remember(key, call)
    return _run(call, active, inputs.row_weight, weight_grad, x)


def _run(
    call: Call,
    active: Tensor | None,
    row_weight: Tensor | None,
    weight_grad: Tensor | None,
    x: Operands,
) -> LinearDivergence:
    function = StashFunction if call.plan.kind == "stash" else RecomputeFunction
    trained = x.student_hidden, x.student_weight, x.student_bias
    work = Work(call, x, active, row_weight, weight_grad, [])
    loss = function.apply(*trained, work)
    return LinearDivergence(loss, *work.fields)


def _wanted(x: Operands, weight_grad: Tensor | None) -> Wanted:
    """The gradients that this call computes."""
    trains, bias = torch.is_grad_enabled(), x.student_bias
    wanted = Wanted(
        trains and x.student_hidden.requires_grad,
        trains and x.student_weight.requires_grad,
        trains and bias is not None and bias.requires_grad,
    )
    if weight_grad is None or not trains:
        return wanted
    if not any(wanted):
        raise ValueError(
            "weight_grad is written by the backward pass, and this call has none: student_hidden, "
            "student_weight or student_bias must require a gradient"
        )
    return wanted._replace(weight=True)


def _reference(
    student: ModelArguments,
    teacher: ModelArguments,
    inputs: Inputs,
    options: Options,
    divergence: Divergence,
) -> LinearDivergence:
    x = inputs.operands
    student_hidden, teacher_hidden = x.student_hidden, x.teacher_hidden
    if inputs.row_weight is not None:
        live = (inputs.row_weight != 0)[:, None]
        student_hidden, teacher_hidden = (
            torch.where(live, hidden, 0) for hidden in (student_hidden, teacher_hidden)
        )
    with matmul.plain_precision(student_hidden):
        fields = reference.linear_divergence(
            student_hidden,
            x.student_weight,
            teacher_hidden,
            x.teacher_weight,
            divergence,
            token_weights=inputs.row_weight,
            temperature=student.transform.temperature,
            teacher_temperature=teacher.transform.temperature,
            student_bias=student.bias,
            teacher_bias=teacher.bias,
            student_softcap=student.transform.softcap,
            teacher_softcap=teacher.transform.softcap,
            student_logit_scale=student.transform.scale,
            teacher_logit_scale=teacher.transform.scale,
            num_classes=inputs.classes,
            student_ids=x.student_ids,
            teacher_ids=x.teacher_ids,
            merge_student_ids=None if inputs.merge is None else inputs.merge[0],
            merge_teacher_ids=None if inputs.merge is None else inputs.merge[1],
            labels=x.labels,
            label_weight=options.label_weight,
            reduction=options.reduction,
            dtype=matmul.logits_dtype(x.student_hidden.dtype),
        )
    return LinearDivergence(**fields)
