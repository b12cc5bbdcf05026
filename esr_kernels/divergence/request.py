"""What a caller asked for besides the tensors, the `Call` that it becomes with them, and the plan
of a call that is yet to be made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from esr_kernels.common.arguments import REDUCTIONS, check_memory_budget, check_size, one_of
from esr_kernels.cpu import rows as rows_native
from esr_kernels.cpu.library import cpu_rows
from esr_kernels.divergence import rows_torch
from esr_kernels.divergence.execute import Call, Operands
from esr_kernels.divergence.plan import KINDS, Plan, Problem, check_kind, make_plan
from esr_kernels.divergence.statistics import RowSpec


@dataclass(frozen=True)
class Request:
    """The checked options of one call."""

    spec: RowSpec
    classes: int  # that both models have, on this rank
    reduction: str
    plan: str | Plan
    memory_budget: int | None
    group: Any  # torch.distributed group or None
    impl: str

    def problem(
        self, x: Operands, tokens: int, wanted: tuple[bool, bool, bool], weight_grad_given: bool
    ) -> Problem:
        """The sizes of a call on `tokens` rows that wants gradients of (hidden, head, bias)."""
        hidden = x.student_hidden
        on_gpu = hidden.device.type != "cpu" or self.impl == "triton"
        return Problem(
            tokens=tokens,
            classes=self.classes,
            student_dim=hidden.shape[1],
            teacher_dim=x.teacher_hidden.shape[1],
            hidden_dtype=hidden.dtype,
            weight_dtype=x.student_weight.dtype,
            device="cuda" if on_gpu else "cpu",
            train_hidden=wanted[0],
            train_weight=wanted[1],
            train_bias=wanted[2],
            two_pass=self.spec.divergence.kl_weights is None,
            per_token_gradient=self.reduction == "none",
            sharded=self.group is not None,
            mapped=x.student_ids is not None,
            weight_grad_given=weight_grad_given,
            rows=self._rows(on_gpu, hidden.dtype),
        )

    def _rows(self, on_gpu: bool, dtype: torch.dtype) -> str:
        if self.impl == "torch":
            return "torch"
        if on_gpu:
            return "torch" if dtype == torch.float64 else "triton"
        return cpu_rows() if rows_native.serves(self.spec.divergence, dtype) else "torch"

    def call(self, problem: Problem) -> Call:
        """Raises ValueError where no plan of the wanted kind fits the budget."""
        plan = self.plan
        kind = plan.kind if isinstance(plan, Plan) else plan
        if kind == "stash" and not problem.needs_gradient:
            plan = make_plan(problem, "recompute", self.memory_budget)  # Nothing to stash.
        elif not isinstance(plan, Plan):
            plan = make_plan(problem, plan, self.memory_budget)
        elif plan.problem.needs_gradient or not problem.needs_gradient:
            # Its chunks on these sizes: which buffers a chunk may share depends on them.
            check_kind(kind, problem)
            plan = replace(plan, problem=problem)
        else:
            plan = make_plan(problem, kind, self.memory_budget)  # Made for no backward.
        rows = _rows_module(problem.rows)
        return Call(self.spec, plan, rows, self.classes, self.reduction, self.group)


def _rows_module(name: str) -> ModuleType:
    if name == "triton":
        from esr_kernels.divergence import rows_triton

        return rows_triton
    return rows_native if name == "native" else rows_torch


def plan_linear_divergence(
    tokens: int,
    classes: int,
    student_dim: int,
    teacher_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    train_hidden: bool = True,
    train_weight: bool = True,
    reduction: str = "sum",
    two_pass: bool = False,
    weight_grad_given: bool = False,
    plan: str = "auto",
    memory_budget: int | None = None,
) -> Plan:
    """The plan that `linear_divergence` would take for these sizes; print it to read it.

    Args:
        tokens, classes, student_dim, teacher_dim: T, the shared V, Ds, Dt.
        dtype: of hidden states and heads; `device`: "cuda", "cpu" or a torch.device.
        train_weight: False for a frozen head, as with LoRA; with `train_hidden` False too, for a
            call that wants no gradient.
        two_pass: True for divergences other than mixes of the two KLs, such as JSD.
        weight_grad_given: True for a call with `weight_grad`.

    Example:
        >>> print(plan_linear_divergence(8192, 151_936, 1536, 3584))
    """
    for name, size in (
        ("classes", classes),
        ("student_dim", student_dim),
        ("teacher_dim", teacher_dim),
    ):
        check_size(name, size, 1)
    check_size("tokens", tokens, 0)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("plan", plan, ("auto", *KINDS))
    check_memory_budget(memory_budget)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    try:
        device = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must name a device of PyTorch, got {device!r}") from error
    rows = "triton"
    if device == "cpu":
        rows = "torch" if dtype == torch.float64 else cpu_rows()
    problem = Problem(
        tokens=tokens,
        classes=classes,
        student_dim=student_dim,
        teacher_dim=teacher_dim,
        hidden_dtype=dtype,
        weight_dtype=dtype,
        device=device,
        train_hidden=train_hidden,
        train_weight=train_weight,
        two_pass=two_pass,
        weight_grad_given=weight_grad_given,
        per_token_gradient=reduction == "none",
        rows=rows,
    )
    return make_plan(problem, plan, memory_budget)
