"""Which plan a call takes: the cheapest within a budget of bytes.

Every candidate chunking that fits the budget is priced by a roofline sum, FLOPs over the machine's
rate plus bytes over its bandwidth, and the cheapest is taken. No launcher changes that choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from esr_kernels.common.arguments import (
    IMPLEMENTATIONS,
    REDUCTIONS,
    check_memory_budget,
    check_size,
    checked_ids,
    one_of,
)
from esr_kernels.common.workspace import default_memory_budget, row_stride
from esr_kernels.divergence import rows_native
from esr_kernels.divergence.losses import Divergence, kernel_form, resolve_divergence
from esr_kernels.divergence.plan import (
    KINDS,
    ROW_STEP,
    SMALLEST_TILE,
    Plan,
    Problem,
    merged_sizes,
    padded_tokens,
)

_MOST_ELEMENTS = 2**31 - 1


@functools.lru_cache(maxsize=1024)
def make_plan(problem: Problem, kind: str = "auto", memory_budget: int | None = None) -> Plan:
    """The cheapest plan of `kind` ("auto" or one of KINDS) within `memory_budget` bytes.

    Raises ValueError if the kind is unknown, does not support the problem, or needs more bytes.
    """
    if kind != "auto" and kind not in KINDS:
        raise ValueError(f"plan must be 'auto', 'stash', 'recompute' or 'fused', got {kind!r}")
    check_memory_budget(memory_budget)
    check_kind(kind, problem)
    budget = default_memory_budget(problem.device) if memory_budget is None else memory_budget
    candidates = [
        plan
        for name in (KINDS if kind == "auto" else (kind,))
        if _obstacle(name, problem) is None
        and not (kind == "auto" and _loses_digits(name, problem))
        for plan in _PLANS_OF_KIND[name](problem)
    ]
    fitting = [plan for plan in candidates if plan.extra_bytes <= budget]
    if fitting:
        return min(fitting, key=lambda plan: plan.cost)
    smallest = min(candidates, key=lambda plan: plan.extra_bytes)
    if memory_budget is None:
        return smallest
    raise ValueError(
        f"memory_budget of {budget} bytes is too small for plan={kind!r}: "
        f"the smallest needs {smallest.extra_bytes} bytes"
    )


def check_kind(kind: str, problem: Problem) -> None:
    """Raise ValueError if plans of this kind do not support the problem."""
    _refuse(kind, _obstacle(kind, problem))


def check_stash(per_token_gradient: bool, sharded: bool) -> None:
    """`check_kind` for "stash", before there is a `Problem`."""
    _refuse("stash", _obstacle_to_stash(per_token_gradient, sharded))


def _refuse(kind: str, obstacle: str | None) -> None:
    if obstacle is not None:
        raise ValueError(f"plan={kind!r} {obstacle}")


def _obstacle(kind: str, problem: Problem) -> str | None:
    if kind == "stash":
        return _obstacle_to_stash(problem.per_token_gradient, problem.sharded)
    return _obstacle_to_fused(problem) if kind == "fused" else None


def _obstacle_to_stash(per_token_gradient: bool, sharded: bool) -> str | None:
    if per_token_gradient:
        return (
            "computes the gradient in the forward pass and cannot serve reduction='none'; "
            "use plan='recompute', or pass token_weights and reduce"
        )
    return "does not shard the vocabulary; use plan='recompute'" if sharded else None


def _loses_digits(kind: str, problem: Problem) -> bool:
    """A stash is rounded before the upstream factor is known, which under fp16 is a loss scale."""
    return kind == "stash" and problem.needs_gradient and problem.hidden_dtype == torch.float16


def _obstacle_to_fused(problem: Problem) -> str | None:
    if problem.device == "cpu" or problem.rows != "triton":
        return "is a Triton kernel and needs a GPU and impl='triton'; use plan='recompute'"
    if problem.mapped:
        return "takes no student_ids and teacher_ids; use plan='recompute'"
    return None


def _even_chunks(size: int, smallest: int) -> list[int]:
    """Chunk sizes for 1, 2, 3, 4, 6, 8, 12, 16, ... even chunks, down to about `smallest`."""
    chunks = [max(size, 1)]
    for doubling in range(size.bit_length()):
        for splits in (2 << doubling, 3 << doubling):
            chunk = math.ceil(size / splits)
            if chunk >= smallest:
                chunks.append(chunk)
    # Always includes the smallest size, so that a budget that suffices for some size always does.
    return chunks if chunks[-1] <= smallest else [*chunks, smallest]


def _row_chunks(rows: int, device: str) -> list[int]:
    """Chunks of up to `rows` tokens. On a GPU their sizes do not depend on the number of tokens."""
    if device == "cpu":
        return _even_chunks(rows, SMALLEST_TILE)
    whole = padded_tokens(rows, device)
    fixed = [SMALLEST_TILE, 2 * SMALLEST_TILE]
    for doubling in range(rows.bit_length()):
        fixed += [ROW_STEP << doubling, 3 * ROW_STEP << doubling]
    return [whole, *(size for size in fixed if size < whole)]


def _stash_plans(problem: Problem) -> list[Plan]:
    if not problem.needs_gradient:
        # Nothing to stash.
        return _recompute_plans(problem)
    base = Plan("stash", problem, 1, 1, problem.classes)
    # Not every product of the vendors' libraries takes a matrix of more elements.
    tallest = max(SMALLEST_TILE, _MOST_ELEMENTS // row_stride(problem.classes))
    return [
        replace(base, token_chunk=token_chunk, logit_chunk=logit_chunk)
        for token_chunk in _row_chunks(problem.tokens, problem.device)
        for logit_chunk in _row_chunks(token_chunk, problem.device)
        if token_chunk <= tallest or problem.device == "cpu"
    ]


def _recompute_plans(problem: Problem) -> list[Plan]:
    base = Plan("recompute", problem, problem.tokens, problem.tokens, 1)
    return [
        replace(base, vocab_chunk=row_stride(size))
        for size in _even_chunks(problem.classes, SMALLEST_TILE)
    ]


def _fused_plans(problem: Problem) -> list[Plan]:
    plans = [replace(plan, kind="fused") for plan in _recompute_plans(problem)]
    return plans if problem.needs_gradient or problem.two_pass else plans[:1]


_PLANS_OF_KIND = {"stash": _stash_plans, "recompute": _recompute_plans, "fused": _fused_plans}


def row_pass_backend(on_gpu: bool, impl: str, dtype: torch.dtype, divergence: Divergence) -> str:
    """What computes the row passes: "triton", "native" (compiled C) or "torch"."""
    if impl == "torch" or dtype == torch.float64:
        return "torch"
    if on_gpu:
        # A divergence without a kernel runs in PyTorch, unless Triton is requested.
        return "triton" if impl == "triton" or kernel_form(divergence) is not None else "torch"
    return "native" if rows_native.supports(divergence) else "torch"


def checked_merge(
    student: Sequence[int] | Tensor | None, teacher: Sequence[int] | Tensor | None, group: Any
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`merge_student_ids` and `merge_teacher_ids` where no heads are known; None for neither."""
    if student is None and teacher is None:
        return None
    if student is None or teacher is None:
        raise ValueError("merge_student_ids and merge_teacher_ids must be given together")
    if group is not None:
        raise ValueError(
            "merge_student_ids cannot be merged over a sharded vocabulary: group must be None"
        )
    return checked_ids("merge_student_ids", student), checked_ids("merge_teacher_ids", teacher)


def plan_linear_divergence(
    tokens: int,
    classes: int,
    student_dim: int,
    teacher_dim: int,
    divergence: Divergence | str = "reverse_kl",
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    train_hidden: bool = True,
    train_weight: bool = True,
    train_bias: bool = False,
    reduction: str = "sum",
    ids: bool = False,
    merge_student_ids: Sequence[int] | Tensor | None = None,
    merge_teacher_ids: Sequence[int] | Tensor | None = None,
    weight_grad: bool = False,
    group: Any = None,
    plan: str = "auto",
    memory_budget: int | None = None,
    impl: str = "auto",
) -> Plan:
    """The plan that `linear_divergence` takes for these sizes; `print` shows chunks and costs.

    Args:
        tokens: T, without the rows of weight 0 that the call leaves out.
        classes: the classes that both models have; with `group`, those of this rank.
        student_dim, teacher_dim: Ds, Dt.
        dtype: of hidden states and heads; `device`: "cuda", "cpu" or a torch.device.
        train_hidden, train_weight, train_bias: which of the student's operands require a gradient;
            train_weight is False for a frozen head, as with LoRA.
        ids: True for a call with student_ids and teacher_ids.
        weight_grad: True for a call with `weight_grad`.
        divergence: as in the call, like reduction, merge_student_ids, merge_teacher_ids, group,
            plan, memory_budget and impl.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed; also if no plan
            of the requested kind supports the call or fits the budget.

    Example:
        >>> print(plan_linear_divergence(8192, 151_936, 1536, 3584))
    """
    check_size("tokens", tokens, 0)
    for name, size in (
        ("classes", classes),
        ("student_dim", student_dim),
        ("teacher_dim", teacher_dim),
    ):
        check_size(name, size, 1)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("impl", impl, IMPLEMENTATIONS)
    one_of("plan", plan, ("auto", *KINDS))
    if impl == "reference":
        raise ValueError("impl='reference' holds all logits and has no plan")
    check_memory_budget(memory_budget)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a device of PyTorch, got {device!r}") from error
    name = str(place) if place.type != "cpu" else "cuda" if impl == "triton" else "cpu"
    on_gpu = name != "cpu"
    resolved = resolve_divergence(divergence)
    merge = checked_merge(merge_student_ids, merge_teacher_ids, group)
    problem = Problem(
        tokens=tokens,
        classes=classes,
        student_dim=student_dim,
        teacher_dim=teacher_dim,
        hidden_dtype=dtype,
        weight_dtype=dtype,
        device=name,
        train_hidden=train_hidden,
        train_weight=train_weight or weight_grad,
        train_bias=train_bias,
        two_pass=resolved.kl_weights is None,
        per_token_gradient=reduction == "none",
        sharded=group is not None,
        mapped=ids,
        weight_grad_given=weight_grad,
        rows=row_pass_backend(on_gpu, impl, dtype, resolved),
        merged=merged_sizes(merge),
    )
    kind = "recompute" if plan == "stash" and not problem.needs_gradient else plan
    return make_plan(problem, kind, memory_budget)
