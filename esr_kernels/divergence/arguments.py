"""Checks of the arguments of `linear_divergence`; each error names the argument."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.arguments import (
    IMPLEMENTATIONS,
    REDUCTIONS,
    can_read_values,
    check_bias,
    check_impl,
    check_memory_budget,
    check_number,
    check_operands,
    check_size,
    check_tensor,
    checked_token_weights,
    checked_transform,
    one_of,
    ready,
)
from esr_kernels.common.rows import to_device
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.call import Merge, Operands
from esr_kernels.divergence.plan import KINDS, Plan
from esr_kernels.divergence.planner import check_stash, checked_merge
from esr_kernels.divergence.statistics import IGNORED_LABEL

# Row statistics hold class numbers in fp32, which is exact below this.
_MOST_CLASSES = 1 << 24
# Heads of one tokenizer differ by at most this share of their rows, by padding.
_PADDING_SHARE = 0.1


@dataclass(frozen=True)
class ModelArguments:
    """The arguments that belong to one of the two models."""

    name: str  # "student" or "teacher", the prefix of the arguments
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor | None
    transform: LogitTransform


@dataclass(frozen=True)
class Options:
    """The arguments that belong to neither model. `linear_divergence` documents each."""

    token_weights: Tensor | None = None
    num_classes: int | None = None
    labels: Tensor | None = None
    label_weight: float = 0.0
    merge_student_ids: Sequence[int] | Tensor | None = None
    merge_teacher_ids: Sequence[int] | Tensor | None = None
    weight_grad: Tensor | None = None
    reduction: str = "sum"
    plan: str | Plan = "auto"
    memory_budget: int | None = None
    compact: bool | None = None
    group: Any = None
    impl: str = "auto"


@dataclass(frozen=True)
class Inputs:
    """Checked tensors: one dtype per model, contiguous rows."""

    operands: Operands
    row_weight: Tensor | None  # [T], in the logits' dtype
    classes: int  # that both models have
    merge: Merge | None
    warned: bool  # of something, as every such call is


def check_options(options: Options) -> None:
    """Raise on an option that is not allowed with any tensors."""
    checked_merge(options.merge_student_ids, options.merge_teacher_ids, options.group)
    one_of("reduction", options.reduction, REDUCTIONS)
    one_of("impl", options.impl, IMPLEMENTATIONS)
    one_of("compact", options.compact, (None, True, False))
    check_number("label_weight", options.label_weight)
    check_memory_budget(options.memory_budget)
    plan, group = options.plan, options.group
    kind = plan.kind if isinstance(plan, Plan) else plan
    one_of("plan", kind, ("auto", *KINDS))
    if isinstance(plan, Plan) and options.memory_budget is not None:
        raise ValueError("memory_budget must be None with a Plan, whose chunks are set")
    # A compiler may hold a symbol in place of the number.
    if options.num_classes is not None and not torch.compiler.is_compiling():
        check_size("num_classes", options.num_classes, 1)
    # PyTorch 2.11's compiler cannot trace the question of a group.
    if group is not None and not torch.compiler.is_compiling() and not hasattr(group, "size"):
        raise TypeError(
            f"group must be a torch.distributed process group, got {type(group).__name__} {group!r}"
        )
    if group is not None and options.impl == "reference":
        raise ValueError("impl='reference' does not shard the vocabulary: group must be None")
    if kind == "stash":
        check_stash(options.reduction == "none", group is not None)


def checked_transforms(
    temperature: float,
    teacher_temperature: float | None,
    student_softcap: float | None,
    teacher_softcap: float | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
) -> tuple[LogitTransform, LogitTransform]:
    """The transforms of the student's and the teacher's logits; raises on a bad value."""
    of_teacher = temperature if teacher_temperature is None else teacher_temperature
    return (
        checked_transform(
            ("student_logit_scale", student_logit_scale),
            ("student_softcap", student_softcap),
            ("temperature", temperature),
        ),
        checked_transform(
            ("teacher_logit_scale", teacher_logit_scale),
            ("teacher_softcap", teacher_softcap),
            ("teacher_temperature", of_teacher),
        ),
    )


def check_inputs(student: ModelArguments, teacher: ModelArguments, options: Options) -> Inputs:
    """Raise on the first tensor that cannot be used, else return the tensors to compute with."""
    ready_tensors = []
    for model in (student, teacher):
        hidden, weight = f"{model.name}_hidden", f"{model.name}_weight"
        rows = check_operands(hidden, model.hidden, weight, model.weight)
        check_bias(f"{model.name}_bias", model.bias, model.hidden, rows)
    for model in (student, teacher):
        names = f"{model.name}_hidden", f"{model.name}_weight"
        ready_tensors.append(ready(names[0], model.hidden, names[1], model.weight))
    (student_hidden, student_weight), (teacher_hidden, teacher_weight) = ready_tensors
    check_impl(options.impl, "student_hidden", student_hidden)
    device, tokens = student_hidden.device, student_hidden.shape[0]
    if teacher_hidden.shape[0] != tokens:
        raise ValueError(
            "student_hidden and teacher_hidden must have the same number of tokens, got "
            f"{tokens} and {teacher_hidden.shape[0]}"
        )
    check_tensor("teacher_hidden", teacher_hidden, like=student_hidden)
    student_ids, teacher_ids = student.ids, teacher.ids
    sharded, warned = options.group is not None, False
    if student_ids is None and teacher_ids is None:
        both = student_weight.shape[0], teacher_weight.shape[0]
        classes = _classes(options.num_classes, *both)
        if options.num_classes is None and not sharded and not torch.compiler.is_compiling():
            warned = _warn_of_unlike_vocabularies(*both)
    else:
        student_ids, teacher_ids = _mapped_classes(
            options.num_classes, student_ids, teacher_ids, student_weight, teacher_weight
        )
        classes = student_ids.shape[0]
    merge = checked_merge(options.merge_student_ids, options.merge_teacher_ids, options.group)
    if merge is not None:
        check_rows_of_merge(merge, student_weight, teacher_weight)
        check_classes_of_merge(merge, classes, student_ids, teacher_ids)
    labels = options.labels
    if labels is not None:
        labels = _labels(labels, tokens, classes, device, sharded)
    if not abs(options.label_weight) < math.inf:
        raise ValueError(f"label_weight must be finite, got {options.label_weight}")
    if options.label_weight and labels is None:
        raise ValueError(f"label_weight is {options.label_weight} and there are no labels")
    if options.weight_grad is not None:
        _check_weight_grad(options.weight_grad, student_weight, options.impl)
    if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise TypeError(
            "student and teacher must both be float64 or neither, got "
            f"{student_hidden.dtype} and {teacher_hidden.dtype}"
        )
    teacher_bias = None if teacher.bias is None else teacher.bias.detach().contiguous()
    operands = Operands(
        student_hidden,
        student_weight,
        None if student.bias is None else student.bias.contiguous(),
        student_ids,
        teacher_hidden.detach(),
        teacher_weight.detach(),
        teacher_bias,
        teacher_ids,
        labels,
    )
    row_weight = checked_token_weights(options.token_weights, student_hidden)
    return Inputs(operands, row_weight, classes, merge, warned)


def repeated_inputs(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None],
    token_weights: Tensor | None,
    labels: Tensor | None,
) -> tuple[Operands, Tensor | None]:
    """Operands and row weights of a call whose like has passed `check_inputs`.

    Hidden states, head and bias of each model; all are on one device, and nothing is cast.
    """
    hidden, weight, bias = teacher
    if hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        teacher = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    x = Operands(
        *_contiguous(student),
        None,
        *_contiguous(teacher),
        None,
        None if labels is None else labels.contiguous(),
    )
    if token_weights is not None:
        token_weights = token_weights.to(matmul.logits_dtype(student[0].dtype)).contiguous()
    return x, token_weights


def _contiguous(
    model: tuple[Tensor, Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden, weight, bias = model
    return hidden.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()


def _check_weight_grad(weight_grad: Tensor, student_weight: Tensor, impl: str) -> None:
    shape, dtype = tuple(student_weight.shape), matmul.logits_dtype(student_weight.dtype)
    check_tensor("weight_grad", weight_grad, dtypes=(dtype,), shape=shape, like=student_weight)
    if can_read_values(weight_grad) and weight_grad.data_ptr() == student_weight.data_ptr() != 0:
        raise ValueError("weight_grad must not be the memory of student_weight itself")
    if not weight_grad.is_contiguous() or weight_grad.requires_grad:
        raise ValueError("weight_grad must be contiguous and require no gradient")
    if impl == "reference":
        raise ValueError("impl='reference' has autograd's gradients only: weight_grad must be None")


def _classes(num_classes: int | None, student: int, teacher: int) -> int:
    most = min(student, teacher)
    if most == 0:
        raise ValueError("student_weight and teacher_weight must have at least one row each")
    classes = most if num_classes is None else num_classes
    if not isinstance(classes, int) or isinstance(classes, bool) or not 0 < classes <= most:
        raise ValueError(
            f"num_classes must be an integer from 1 to {most}, the rows that student_weight "
            f"({student}) and teacher_weight ({teacher}) share, got {num_classes!r}"
        )
    if classes >= _MOST_CLASSES:
        raise ValueError(f"num_classes must be below {_MOST_CLASSES}, got {classes}")
    return classes


def _warn_of_unlike_vocabularies(student: int, teacher: int) -> bool:
    # Heads of one tokenizer are padded by a few rows.
    unlike = abs(student - teacher) > _PADDING_SHARE * max(student, teacher)
    if unlike:
        warnings.warn(
            f"student_weight has {student} rows and teacher_weight {teacher}: taking the first "
            f"{min(student, teacher)} as the same classes. Say num_classes if they are, and "
            "student_ids and teacher_ids if the models number their tokens differently",
            stacklevel=4,
        )
    return unlike


def _mapped_classes(
    num_classes: int | None,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    student_weight: Tensor,
    teacher_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    if student_ids is None or teacher_ids is None:
        raise ValueError("student_ids and teacher_ids must be given together")
    if num_classes is not None:
        raise ValueError(
            f"num_classes must be None where student_ids are given, got {num_classes}: "
            "the ids say which classes are shared"
        )
    for name, ids, rows in (
        ("student_ids", student_ids, student_weight.shape[0]),
        ("teacher_ids", teacher_ids, teacher_weight.shape[0]),
    ):
        check_tensor(name, ids, dtypes=(torch.int64,), shape=("classes",))
        if ids.numel() == 0:
            raise ValueError(f"{name} must not be empty")
        check_id_values(name, ids, rows)
    if student_ids.shape != teacher_ids.shape:
        raise ValueError(
            "student_ids and teacher_ids must have the same length, got "
            f"{student_ids.shape[0]} and {teacher_ids.shape[0]}"
        )
    device = student_weight.device
    # Contiguous: kernels read them without a stride.
    return (
        to_device(student_ids, device).contiguous(),
        to_device(teacher_ids, device).contiguous(),
    )


def check_id_values(name: str, ids: Tensor, rows: int) -> None:
    """Raise unless the ids are distinct rows of a head; on a GPU they are not read."""
    if not can_read_values(ids):
        return
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ValueError(
            f"{name} must lie in [0, {rows}), the rows of the head, "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    if ids.unique().numel() != ids.numel():
        raise ValueError(f"{name} must be distinct, got duplicates")


def check_rows_of_merge(merge: Merge, student_weight: Tensor, teacher_weight: Tensor) -> None:
    """Raise unless every member is a row of its model's head."""
    for name, ids, weight in (
        ("student", merge[0], student_weight),
        ("teacher", merge[1], teacher_weight),
    ):
        if max(ids) >= weight.shape[0]:
            raise ValueError(
                f"merge_{name}_ids must lie in [0, {weight.shape[0]}), the rows of "
                f"{name}_weight, got {max(ids)}"
            )


def check_classes_of_merge(
    merge: Merge, classes: int, student_ids: Tensor | None, teacher_ids: Tensor | None
) -> None:
    """Raise unless both groups have the same shared classes; maps on a GPU are not read."""
    maps = (student_ids, teacher_ids)
    if any(rows is not None and not can_read_values(rows) for rows in maps):
        return
    # Class -> row of the head, of the shared classes in each group.
    groups = []
    for ids, rows in zip(merge, maps, strict=True):
        if rows is None:
            groups.append({row: row for row in ids if row < classes})
        else:
            found = torch.isin(rows, torch.tensor(ids)).nonzero()[:, 0].tolist()
            groups.append({shared: int(rows[shared]) for shared in found})
    names = "merge_student_ids", "merge_teacher_ids"
    for this, other in ((0, 1), (1, 0)):
        for shared, row in groups[this].items():
            if shared not in groups[other]:
                rows = maps[other]
                missing = shared if rows is None else int(rows[shared])
                raise ValueError(
                    f"{names[other]} must have row {missing}, the class of both models that is row "
                    f"{row} in {names[this]}; got {list(merge[other])}"
                )


def check_label_values(labels: Tensor, classes: int, sharded: bool) -> None:
    """Raise unless every label is a class or IGNORED_LABEL; on a GPU they are not read."""
    if not can_read_values(labels) or not labels.numel():
        return
    other_rank = -1 if sharded else IGNORED_LABEL
    wrong = (labels >= classes) | ((labels < 0) & (labels != IGNORED_LABEL))
    wrong &= labels != other_rank
    if bool(wrong.any()):
        raise ValueError(
            f"labels must lie in [0, {classes}) or be {IGNORED_LABEL}, got {int(labels[wrong][0])}"
        )


def _labels(
    labels: Tensor, tokens: int, classes: int, device: torch.device, sharded: bool
) -> Tensor:
    check_tensor("labels", labels, dtypes=(torch.int64,), shape=(tokens,))
    check_label_values(labels, classes, sharded)
    return to_device(labels, device).contiguous()
