"""`linear_divergence` as operators for torch.compile; imported when a compiler traces a call.

A compiler cannot trace a loop over chunks whose number depends on the batch, so there are three
opaque operators: a forward with gradients, a forward without, and the backward of the latter. Their
other arguments are strings and numbers. Plans are made, rows of weight 0 dropped and values checked
when an operator runs. Only the choice between the two forwards is made at compile time, from
constant sizes and one comparison with the number of tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.arguments import checked_token_weights
from esr_kernels.common.rows import active_rows, to_device
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.arguments import (
    check_classes_of_merge,
    check_id_values,
    check_label_values,
)
from esr_kernels.divergence.call import (
    Call,
    Gradients,
    Operands,
    Outputs,
    Request,
    Wanted,
    check_model,
)
from esr_kernels.divergence.losses import Divergence
from esr_kernels.divergence.plan import Plan, Problem, merged_sizes
from esr_kernels.divergence.planner import check_stash, make_plan
from esr_kernels.divergence.recompute import recompute_backward, recompute_forward
from esr_kernels.divergence.stash import stash_forward
from esr_kernels.divergence.statistics import RowNormalizers, RowSpec

_OPERANDS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? student_ids, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? teacher_ids, "
    "Tensor? labels, Tensor? token_weights, Tensor{}? weight_grad"
)
_OPTIONS = (
    "str divergence, float[] parameters, float[] student, float[] teacher, float label_weight, "
    "SymInt classes, str reduction, str plan, int[] chunks, int? memory_budget, str? group, "
    "str impl, int[] merge_student_ids, int[] merge_teacher_ids, bool compact, bool[] wanted"
)
_NORMALIZERS = ", ".join(f"Tensor {name}" for name in RowNormalizers._fields)
_ROWS = len(RowNormalizers._fields)
_MOST_DOUBLINGS = 24
_FIELDS = 7  # of LinearDivergence, besides the loss
_TENSORS = len(Operands._fields) + 2  # with the token and the gradient that weights get


class _Options(NamedTuple):
    """`Request` and more in types that an operator may take, in the order of the schema."""

    divergence: str
    parameters: list[float]
    student: list[float]  # scale, softcap or 0, temperature
    teacher: list[float]
    label_weight: float
    classes: int
    reduction: str
    plan: str
    chunks: list[int]  # of a `Plan` that the caller made, else empty
    memory_budget: int | None
    group: Any  # name of a process group or None
    impl: str
    merge_student_ids: list[int]  # empty for none
    merge_teacher_ids: list[int]
    compact: bool
    wanted: list[bool]


def traced(
    request: Request,
    operands: Operands,
    token_weights: Tensor | None,
    weight_grad: Tensor | None,
    compact: bool,
    wanted: Wanted,
) -> Outputs:
    """(loss, the fields of `LinearDivergence`), as one node of the graph being traced."""
    plan, spec, merge = request.plan, request.spec, request.merge or ((), ())
    chunks: list[int] = []
    if isinstance(plan, Plan):
        check_model(plan.problem, _sizes(request, operands))
        chunks = [plan.token_chunk, plan.logit_chunk, plan.vocab_chunk]
        plan = plan.kind
    if plan == "auto":
        limit = _stash_limit(request, operands, wanted, weight_grad is not None)
        stashes = operands.student_hidden.shape[0] <= limit
        plan = "stash" if stashes else "auto"
    if plan == "stash":
        check_stash(request.reduction == "none", request.group is not None)
    if plan == "stash" and not any(wanted):
        plan, chunks = "recompute", []  # Nothing to stash.
    options = _Options(
        type(spec.divergence).__module__ + "." + type(spec.divergence).__qualname__,
        [getattr(spec.divergence, field.name) for field in fields(spec.divergence)],
        [spec.student.scale, spec.student.softcap or 0.0, spec.student.temperature],
        [spec.teacher.scale, spec.teacher.softcap or 0.0, spec.teacher.temperature],
        spec.label_weight,
        request.classes,
        request.reduction,
        plan,
        chunks,
        request.memory_budget,
        None if request.group is None else request.group.group_name,
        request.impl,
        list(merge[0]),
        list(merge[1]),
        compact,
        list(wanted),
    )
    forward = _stash if plan == "stash" else _recompute
    outputs = forward(*operands, token_weights, weight_grad, *options)
    return outputs[: 1 + _FIELDS]


def _sizes(request: Request, x: Operands) -> Problem:
    """What a compiler knows of the problem, with no tokens."""
    on_cpu = x.student_hidden.device.type == "cpu" and request.impl != "triton"
    return Problem(
        0,
        request.classes,
        x.student_hidden.shape[1],
        x.teacher_hidden.shape[1],
        x.student_hidden.dtype,
        x.student_weight.dtype,
        "cpu" if on_cpu else "cuda",
    )


def _stash_limit(request: Request, x: Operands, wanted: Wanted, adds: bool) -> int:
    """`stash_limit` from arguments that are constants to a compiler."""
    return _constant_stash_limit(
        request.memory_budget,
        # With dynamic shapes this specialises the graph on the sizes of the models.
        operator.index(request.classes),
        operator.index(x.student_hidden.shape[1]),
        operator.index(x.teacher_hidden.shape[1]),
        x.student_hidden.dtype,
        x.student_weight.dtype,
        "cpu" if x.student_hidden.device.type == "cpu" and request.impl != "triton" else "cuda",
        wanted[0],
        wanted[1],
        request.spec.divergence.kl_weights is None,
        request.reduction == "none",
        request.group is not None,
        x.student_ids is not None,
        adds,
        wanted[2],
        merged_sizes(request.merge),
    )


@torch.compiler.assume_constant_result
def _constant_stash_limit(memory_budget: int | None, *sizes: Any) -> int:
    # Those of PyTorch take the most memory.
    *sizes_of_models, merged = sizes
    problem = replace(Problem(1, *sizes_of_models), rows="torch", merged=merged)
    return stash_limit(problem, memory_budget)


def stash_limit(problem: Problem, memory_budget: int | None) -> int:
    """The most tokens, a power of two, up to which "auto" is a stash; -1 if it never is.

    A graph compares its number of tokens with this limit instead of making a plan for it, which
    would make a graph for each number. `problem.tokens` is not used.
    """
    limit = -1
    try:
        for doublings in range(_MOST_DOUBLINGS * int(problem.needs_gradient)):
            trial = replace(problem, tokens=1 << doublings)
            if make_plan(trial, "auto", memory_budget).kind != "stash":
                break
            limit = trial.tokens
    except ValueError:  # Not even a recompute fits.
        pass
    return limit


def _subclasses(of: Any) -> Iterator[Any]:
    for cls in of.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _divergence(name: str, parameters: list[float]) -> Divergence:
    found = [c for c in _subclasses(Divergence) if name == f"{c.__module__}.{c.__qualname__}"]
    if not found:
        raise ValueError(f"divergence {name} is not defined any more")
    return found[-1](*parameters)  # type: ignore[no-any-return]  # the latest, if a notebook cell ran twice


class _Running(NamedTuple):
    """The arguments of an operator, decoded."""

    call: Call
    active: Tensor | None
    row_weight: Tensor | None
    operands: Operands
    wanted: Wanted
    weight_grad: Tensor | None


def _decode(arguments: tuple[Any, ...], stashes: bool) -> _Running:
    *tensors, token_weights, weight_grad = arguments[:_TENSORS]
    operands, o = Operands(*tensors), _Options(*arguments[_TENSORS:])
    hidden = operands.student_hidden
    # Values, which could not be checked during tracing.
    for name in ("student", "teacher"):
        ids: Tensor | None = getattr(operands, f"{name}_ids")
        if ids is not None:
            weight: Tensor = getattr(operands, f"{name}_weight")
            check_id_values(f"{name}_ids", ids, weight.shape[0])
    merge = None
    if o.merge_student_ids:
        merge = tuple(o.merge_student_ids), tuple(o.merge_teacher_ids)
        check_classes_of_merge(merge, o.classes, operands.student_ids, operands.teacher_ids)
    if operands.labels is not None:
        check_label_values(operands.labels, o.classes, o.group is not None)
    active = active_rows(token_weights, o.compact)
    active = None if active is None else to_device(active, hidden.device)
    group = None
    if o.group is not None:
        from torch.distributed.distributed_c10d import _resolve_process_group

        group = _resolve_process_group(o.group)
    student, teacher = (LogitTransform(z[0], z[1] or None, z[2]) for z in (o.student, o.teacher))
    request = Request(
        RowSpec(_divergence(o.divergence, o.parameters), student, teacher, o.label_weight),
        o.classes,
        o.reduction,
        o.plan,
        o.memory_budget,
        group,
        o.impl,
        merge,
    )
    tokens = hidden.shape[0] if active is None else active.shape[0]
    wanted = Wanted(*o.wanted)
    problem = request.problem(operands, tokens, wanted, weight_grad is not None)
    if o.chunks:
        request = replace(request, plan=Plan(o.plan, problem, *o.chunks))
    elif not stashes:
        # This operator computes gradients in the backward: "auto" must not be a stash.
        problem = replace(problem, per_token_gradient=True)
    row_weight = checked_token_weights(token_weights, hidden)
    return _Running(request.call(problem), active, row_weight, operands, wanted, weight_grad)


def _apart(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Contiguous copies: outputs of an operator must not share memory."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _present(gradients: Gradients, like: Tensor) -> tuple[Tensor, ...]:
    """The gradients, with an empty tensor for each that is not needed."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def _define(name: str, arguments: str, results: int, mutates: tuple[str, ...] = ()) -> Any:
    operands = _OPERANDS.format("(a!)" if mutates else "")
    returned = ", ".join(["Tensor"] * results)
    return torch.library.custom_op(
        f"esr_kernels::{name}",
        mutates_args=mutates,
        schema=f"({operands}, {arguments}) -> ({returned})",
    )


@_define("divergence_and_gradients", _OPTIONS, 1 + _FIELDS + 3)
def _stash(*arguments: Any) -> tuple[Tensor, ...]:
    x = _decode(arguments, stashes=True)
    outputs, gradients = stash_forward(x.call, x.active, x.row_weight, x.operands, x.wanted)
    return (*_apart(outputs), *_present(gradients, x.operands.student_hidden))


@_define("divergence", _OPTIONS, 1 + _FIELDS + _ROWS)
def _recompute(*arguments: Any) -> tuple[Tensor, ...]:
    x = _decode(arguments, stashes=False)
    outputs, normalizers = recompute_forward(x.call, x.active, x.row_weight, x.operands)
    return _apart((*outputs, *normalizers))


@_define(
    "divergence_backward",
    f"{_NORMALIZERS}, Tensor upstream, {_OPTIONS}",
    3,
    mutates=("weight_grad",),
)
def _recompute_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *normalizers, upstream = arguments[_TENSORS : _TENSORS + _ROWS + 1]
    x = _decode((*arguments[:_TENSORS], *arguments[_TENSORS + _ROWS + 1 :]), stashes=False)
    gradients = recompute_backward(
        x.call,
        x.active,
        x.row_weight,
        x.operands,
        RowNormalizers(*normalizers),
        upstream,
        x.wanted,
        x.weight_grad,
    )
    return _present(gradients, x.operands.student_hidden)


def _fake_gradients(arguments: tuple[Any, ...], stashes: bool) -> tuple[Tensor, ...]:
    weight_grad, wanted = arguments[_TENSORS - 1], list(arguments[-1])
    likes = list(arguments[:3])
    if weight_grad is not None:
        likes[1], wanted[1] = weight_grad, wanted[1] and stashes
    return tuple(
        torch.empty_like(x) if want else arguments[0].new_empty(0)
        for x, want in zip(likes, wanted, strict=True)
    )


def _fake_rows(arguments: tuple[Any, ...], count: int) -> tuple[Tensor, ...]:
    """The loss and `count` vectors over the tokens."""
    hidden, options = arguments[0], _Options(*arguments[_TENSORS:])
    dtype, tokens = matmul.logits_dtype(hidden.dtype), hidden.shape[0]
    loss = hidden.new_empty((tokens,) if options.reduction == "none" else (), dtype=dtype)
    return loss, *(hidden.new_empty(tokens, dtype=dtype) for _ in range(count))


@_stash.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_rows(arguments, _FIELDS) + _fake_gradients(arguments, True)


@_recompute.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_rows(arguments, _FIELDS + _ROWS)


@_recompute_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments, False)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1 + _FIELDS :])
    ctx.weight_grad, ctx.wanted, ctx.inputs = inputs[_TENSORS - 1], inputs[-1], len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """Out of place: a compiler reuses the memory of the stash."""
    gradients: list[Tensor | None] = [None] * 3
    if upstream is not None:
        gradients = [
            # In fp32, as `StashFunction` does and for its reason.
            (x * upstream.view((1,) * x.dim())).to(x.dtype) if want else None
            for x, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
        ]
        if ctx.weight_grad is not None:
            ctx.weight_grad.add_(gradients[1])
            gradients[1] = None
    return *gradients, *[None] * (ctx.inputs - 3)


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS - 1], *output[1 + _FIELDS :])
    ctx.weight_grad = inputs[_TENSORS - 1]
    ctx.options, ctx.inputs = inputs[_TENSORS:], len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _project_again(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    gradients: list[Tensor | None] = [None] * 3
    if upstream is not None:
        operands, normalizers = ctx.saved_tensors[: _TENSORS - 1], ctx.saved_tensors[_TENSORS - 1 :]
        results = _recompute_backward(
            *operands, ctx.weight_grad, *normalizers, upstream.contiguous(), *ctx.options
        )
        gradients = [x if w else None for x, w in zip(results, ctx.options[-1], strict=True)]
        if ctx.weight_grad is not None:
            gradients[1] = None
    return *gradients, *[None] * (ctx.inputs - 3)


_stash.register_autograd(_scale_gradients, setup_context=_keep_gradients)
_recompute.register_autograd(_project_again, setup_context=_keep_rows)
