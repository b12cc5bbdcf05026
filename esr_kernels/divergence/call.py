"""One call of `linear_divergence` with checked arguments: operands, options, the plan and row
passes chosen for them, and buffers for the gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.common import matmul, triton_installed
from esr_kernels.common.arguments import PLAIN_TENSORS
from esr_kernels.common.fp16_range import fp16_scale
from esr_kernels.common.rows import take_rows
from esr_kernels.divergence import rows_native, rows_torch
from esr_kernels.divergence.plan import Plan, Problem, merged_sizes
from esr_kernels.divergence.planner import check_kind, make_plan, row_pass_backend
from esr_kernels.divergence.statistics import RowSpec

# Rows of the student's head and of the teacher's that are merged into one class.
Merge = tuple[tuple[int, ...], tuple[int, ...]]
# (loss, the [T] fields of `LinearDivergence`).
Outputs = tuple[Tensor, ...]


class Wanted(NamedTuple):
    """Which of the student's operands need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class Operands(NamedTuple):
    """Both models: the whole heads, or those of some of the shared classes."""

    student_hidden: Tensor  # [T, Ds]
    student_weight: Tensor  # [Vs, Ds]
    student_bias: Tensor | None  # [Vs]; [V] once over classes
    student_ids: Tensor | None  # [V] rows of the head, None for the first V
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    teacher_ids: Tensor | None
    labels: Tensor | None  # [T] class numbers, negative for none

    def shared(self, classes: int) -> Operands:
        """Of whole heads, the operands over the classes that both models have."""
        if self._has_whole_heads(classes):
            return self
        biases = self.student_bias, self.teacher_bias
        ids = self.student_ids, self.teacher_ids
        student_bias, teacher_bias = (
            bias if bias is None or rows is None else bias[rows]
            for bias, rows in zip(biases, ids, strict=True)
        )
        x = self._replace(student_bias=student_bias, teacher_bias=teacher_bias)
        return x.over(slice(0, classes))

    def _has_whole_heads(self, classes: int) -> bool:
        """Whether the classes are all rows of both heads, in their order."""
        if self.student_ids is not None or self.teacher_ids is not None:
            return False
        return self.student_weight.shape[0] == classes == self.teacher_weight.shape[0]

    def over(self, classes: slice) -> Operands:
        """The operands of a tile of classes; heads of mapped vocabularies are gathered per tile."""
        student_weight, student_ids = _select(self.student_weight, self.student_ids, classes)
        teacher_weight, teacher_ids = _select(self.teacher_weight, self.teacher_ids, classes)
        return Operands(
            self.student_hidden,
            student_weight,
            None if self.student_bias is None else self.student_bias[classes],
            student_ids,
            self.teacher_hidden,
            teacher_weight,
            None if self.teacher_bias is None else self.teacher_bias[classes],
            teacher_ids,
            None if self.labels is None else self.labels - classes.start,
        )

    def take(self, active: Tensor | None, row_weight: Tensor | None) -> Operands:
        """The operands of the active rows. None: all rows, with zeros in rows of weight 0.

        The dz of such a row is 0, and 0 * NaN must not reach the gradient of the head.
        """
        if active is None:
            if row_weight is None:
                return self
            live = row_weight.ne(0)[:, None]
            return self._replace(
                student_hidden=torch.where(live, self.student_hidden, 0),
                teacher_hidden=torch.where(live, self.teacher_hidden, 0),
            )
        return self._replace(
            student_hidden=self.student_hidden[active],
            teacher_hidden=self.teacher_hidden[active],
            labels=None if self.labels is None else self.labels[active],
        )


def row_range(rows: Tensor, start: int, stop: int) -> Tensor:
    """rows[start:stop], for nothing where that is all of them."""
    return rows if start == 0 and stop == rows.shape[0] else rows[start:stop]


def _select(weight: Tensor, ids: Tensor | None, classes: slice) -> tuple[Tensor, Tensor | None]:
    if ids is None:
        return row_range(weight, classes.start, classes.stop), None
    return weight, ids[classes]


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
    merge: Merge | None = None

    def problem(self, x: Operands, tokens: int, wanted: Wanted, weight_grad_given: bool) -> Problem:
        """The sizes of a call on `tokens` active rows."""
        hidden = x.student_hidden
        device = str(hidden.device)
        if device == "cpu" and self.impl == "triton":
            device = "cuda"  # Kernels that run on the CPU, in a test.
        on_gpu = device != "cpu"
        impl = self.impl if triton_installed.TRITON or not on_gpu else "torch"
        return Problem(
            tokens=tokens,
            classes=self.classes,
            student_dim=hidden.shape[1],
            teacher_dim=x.teacher_hidden.shape[1],
            hidden_dtype=hidden.dtype,
            weight_dtype=x.student_weight.dtype,
            device=device,
            train_hidden=wanted.hidden,
            train_weight=wanted.weight,
            train_bias=wanted.bias,
            two_pass=self.spec.divergence.kl_weights is None,
            per_token_gradient=self.reduction == "none",
            sharded=self.group is not None,
            mapped=x.student_ids is not None,
            weight_grad_given=weight_grad_given,
            rows=row_pass_backend(on_gpu, impl, hidden.dtype, self.spec.divergence),
            merged=merged_sizes(self.merge),
        )

    def call(self, problem: Problem) -> Call:
        """Choose the plan. Raises ValueError if no plan of the requested kind fits the budget."""
        plan = self.plan
        kind = plan.kind if isinstance(plan, Plan) else plan
        if kind == "stash" and not problem.needs_gradient:
            plan = make_plan(problem, "recompute", self.memory_budget)  # Nothing to stash.
        elif not isinstance(plan, Plan):
            plan = make_plan(problem, plan, self.memory_budget)
        elif plan.problem.needs_gradient or not problem.needs_gradient:
            # Keeps the chunks, but takes these sizes, on which the buffers depend.
            check_kind(kind, problem)
            check_model(plan.problem, problem)
            plan = replace(plan, problem=problem)
        else:
            raise ValueError(
                "plan was made for a call without gradients, and this one computes gradients"
            )
        rows = _row_passes(problem.rows)
        return Call(self.spec, plan, rows, self.classes, self.reduction, self.group, self.merge)


def check_model(made_for: Problem, has: Problem) -> None:
    """Raise where a plan was made for other heads, dtypes or kind of device than a call has.

    For another number of tokens its chunks are as good.
    """
    for name in ("classes", "student_dim", "teacher_dim", "hidden_dtype", "weight_dtype"):
        planned, called = getattr(made_for, name), getattr(has, name)
        if planned != called:
            raise ValueError(f"plan was made for {name} = {planned}, and this call has {called}")
    if (made_for.device == "cpu") != (has.device == "cpu"):
        raise ValueError(
            f"plan was made for device {made_for.device!r}, and this call has {has.device!r}"
        )


def _row_passes(backend: str) -> ModuleType:
    if backend == "triton":
        from esr_kernels.divergence import rows_triton  # Triton may not be installed.

        return rows_triton
    return rows_native if backend == "native" else rows_torch


@dataclass(frozen=True)
class Call:
    """Everything that decides one call besides its tensors."""

    spec: RowSpec
    plan: Plan
    rows: ModuleType  # rows_triton, rows_native or rows_torch
    classes: int  # that both models have, on this rank
    reduction: str
    group: Any = None  # torch.distributed group over whose ranks the classes are sharded
    merge: Merge | None = None

    def row_weights(
        self, row_weight: Tensor | None, active: Tensor | None, tokens: int
    ) -> tuple[Tensor | None, float]:
        """(weights of the active rows, a common factor): loss = factor * sum(weight * row).

        The factor scales dz before it is rounded, since scaling the gradients would round again.
        """
        if row_weight is not None:
            row_weight = take_rows(row_weight, active)
        if self.reduction != "mean":
            return row_weight, 1.0
        if row_weight is None:
            return None, 1.0 / max(tokens, 1)
        total = row_weight.sum()
        return row_weight / torch.where(total == 0, torch.ones_like(total), total), 1.0


# What decides the checks and the plan of a call: shapes, dtypes, devices, options and the gradients
# that are wanted. A call on a GPU whose key has been seen has passed every check that reads no
# number, and has a plan: checks and planning cost the host more than all launches of a small call.
Key = tuple[Any, ...]
# Every number of tokens is a key of its own.
_MOST = 4096
_VALUES_ARE_READ_ON = ("cpu",)
_calls: dict[Key, Call] = {}


def key_of(
    operands: tuple[Tensor | None, ...],
    per_token: tuple[Tensor | None, ...],
    rare: tuple[object, ...],
    options: tuple[object, ...],
) -> Key | None:
    """What decides checks and plan of a call; None for a call that must be checked in full.

    `operands` are the heads and hidden states, `per_token` weights and labels, whose numbers are
    checked where the host can read them; `rare` are arguments that a call with a key leaves out.
    """
    if torch.compiler.is_compiling():
        return None
    for argument in rare:
        if argument is not None:
            return None
    try:
        place = operands[0].device  # type: ignore[union-attr]
        if place.type == "meta" or torch.is_autocast_enabled(place.type):
            return None
        for x in per_token:
            if x is not None and (x.device != place or place.type in _VALUES_ARE_READ_ON):
                return None
        tensors = []
        for x in operands + per_token:
            if x is not None and type(x) not in PLAIN_TENSORS:
                return None
            tensors.append(x if x is None else (x.shape, x.dtype, x.device, x.requires_grad))
    except (AttributeError, RuntimeError):  # no tensor, or of a kind that does not tell
        return None
    # With their types: True equals 1, and is not as good.
    return torch.is_grad_enabled(), *tensors, *options, *map(type, options)


def seen(key: Key | None) -> Call | None:
    """The call that `remember` has for the key."""
    try:
        return None if key is None else _calls.get(key)
    except TypeError:  # an option that cannot be hashed, or that is wrong
        return None


def remember(key: Key | None, call: Call) -> None:
    """Store the call that has passed all checks, if it is for a GPU."""
    if key is None or call.plan.problem.device == "cpu":
        return
    if len(_calls) >= _MOST:
        _calls.clear()
    try:
        _calls[key] = call
    except TypeError:
        return


class Gradients(NamedTuple):
    """Gradients, or buffers for them, of hidden [T, D], weight [Vs, D] and bias [Vs]; None if
    not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def over_shared_classes(self, x: Operands, classes: int) -> Gradients:
        """With the part of the head's buffer that belongs to classes that both models have."""
        if x.student_ids is not None or self.weight is None or self.weight.shape[0] == classes:
            return self
        return self._replace(weight=self.weight[:classes])

    def add_to_bias(self, x: Operands, classes: slice, total: Tensor, alpha: float = 1.0) -> None:
        """Add the gradient `total` of the bias of some of the shared classes."""
        assert self.bias is not None
        if x.student_ids is None:
            self.bias[classes].add_(total, alpha=alpha)
        else:
            self.bias.index_add_(0, x.student_ids, total, alpha=alpha)

    def in_dtype_of(self, operands: Operands) -> Gradients:
        """The gradients with that of the bias, summed in the logits' dtype, in its final dtype."""
        if self.bias is None or operands.student_bias is None:
            return self
        return self._replace(bias=self.bias.to(operands.student_bias.dtype))


def new_gradients(wanted: Wanted, x: Operands, call: Call) -> Gradients:
    """Uninitialised buffers, except for 0 in rows of the head that the models do not share."""
    dtype = matmul.logits_dtype(x.student_hidden.dtype)
    hidden = torch.empty_like(x.student_hidden) if wanted.hidden else None
    weight = bias = None
    if wanted.weight:
        # A gradient that is added to the caller's fp32 buffer must not be rounded first.
        given = call.plan.problem.weight_grad_given
        weight = torch.empty_like(x.student_weight, dtype=dtype if given else None)
        if weight.device.type == "cpu":
            cpu.on_huge_pages(weight)
        shared = 0 if x.student_ids is not None else call.classes
        if shared < weight.shape[0]:
            weight[shared:].zero_()
    if wanted.bias and x.student_bias is not None:
        bias = torch.zeros_like(x.student_bias, dtype=dtype)
    return Gradients(hidden, weight, bias)


def scaled_to_fp16(row_weight: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(row weights for dz, the factor that restores the gradients), for fp16 operands."""
    if row_weight is None:
        row_weight = torch.ones(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    scale = fp16_scale(row_weight)
    return row_weight * scale, scale.reciprocal()


def accumulator(gradient: Tensor | None, wide: bool) -> Tensor | None:
    """The buffer in which a gradient is summed: fp32 if `wide`, else the gradient itself."""
    if gradient is None or not wide or gradient.dtype.itemsize >= 4:
        return gradient
    return torch.zeros_like(gradient, dtype=torch.float32)


def finish(gradient: Tensor | None, total: Tensor | None, restore: Tensor | None) -> None:
    """Write the sum `total`, scaled by `restore`, to the gradient."""
    if gradient is None or total is None:
        return
    if restore is not None:
        total.mul_(restore)
    if total is not gradient:
        gradient.copy_(total)
