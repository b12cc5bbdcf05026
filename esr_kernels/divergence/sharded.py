"""DTensors in a call of `linear_divergence`: gathered, or as shards of the vocabulary.

A student's head is gathered where each rank has tokens of its own: FSDP. Where all ranks have the
same tokens, which a replicated DTensor as `student_hidden` or `group` says, each rank keeps its
rows of the head: tensor parallelism. The teacher's head is needed for the same classes. Its shard
is used if it has them, else the whole is gathered.

Where the student's head is a DTensor, all arguments are in global terms: a plain teacher's head, a
plain bias, `labels` and `num_classes` are those of the whole vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from esr_kernels.common.sharded import (
    check_weight_grad,
    gathered,
    gathered_head,
    replicated,
)
from esr_kernels.divergence.arguments import check_label_values
from esr_kernels.divergence.statistics import IGNORED_LABEL

_OTHER_RANK = -1


class Shardable(NamedTuple):
    """The arguments of `linear_divergence` that sharding is about."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    token_weights: Tensor | None
    labels: Tensor | None
    num_classes: int | None
    weight_grad: Tensor | None
    group: Any


def as_plain(x: Shardable, mapped: bool) -> Shardable:
    """The arguments for this rank, none of them a DTensor.

    `mapped`: the call has `student_ids`.

    Raises:
        TypeError or ValueError naming the argument, what it was and what is allowed; on all ranks
        alike if all of them were given the same.
    """
    student = x.student_weight
    if isinstance(student, DTensor) and (x.group is not None or _is_dtensor(x.student_hidden)):
        axis = _vocabulary_axis(student)
        if axis is not None:
            return _vocabulary_parallel(x, student, axis, mapped)
        if x.group is not None:
            raise ValueError(
                "group shards the vocabulary, and student_weight is not sharded: pass group=None"
            )
    elif x.group is not None:
        _refuse_mixed(x)
    if (
        x.weight_grad is not None
        and not isinstance(student, DTensor)
        and _is_dtensor(x.weight_grad)
    ):
        raise ValueError("weight_grad must be a plain tensor where student_weight is one")
    own = gathered_head(_names("student"), x.student_hidden, student, x.student_bias, x.weight_grad)
    frozen = x.teacher_weight.detach(), None if x.teacher_bias is None else x.teacher_bias.detach()
    teacher = gathered_head(_names("teacher"), x.teacher_hidden, *frozen)
    return x._replace(
        student_hidden=own.hidden,
        student_weight=own.weight,
        student_bias=own.bias,
        weight_grad=own.weight_grad,
        teacher_hidden=teacher.hidden,
        teacher_weight=teacher.weight,
        teacher_bias=teacher.bias,
        token_weights=_replicated("token_weights", x.token_weights),
        labels=_replicated("labels", x.labels),
    )


def _replicated(name: str, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else replicated(name, tensor)


def _is_dtensor(tensor: Tensor | None) -> bool:
    return isinstance(tensor, DTensor)


def _names(model: str) -> tuple[str, str, str]:
    return f"{model}_hidden", f"{model}_weight", f"{model}_bias"


def _refuse_mixed(x: Shardable) -> None:
    """A plain head and `group`: each rank passes its own rows of both heads."""
    for name in ("student_bias", "teacher_weight", "teacher_bias", "weight_grad"):
        if _is_dtensor(getattr(x, name)):
            raise ValueError(
                f"{name} must be a plain tensor, this rank's shard, where group is given with a "
                "plain student_weight; or make student_weight a DTensor with Shard(0)"
            )


def _vocabulary_axis(weight: DTensor) -> int | None:
    """The axis of the mesh over which the rows of a head are sharded; None if they are not."""
    axes = [axis for axis, size in enumerate(weight.device_mesh.shape) if size > 1]
    sharded = [axis for axis in axes if not weight.placements[axis].is_replicate()]
    if not sharded:
        return None
    if len(axes) > 1 or not weight.placements[axes[0]].is_shard(0):
        raise ValueError(
            "student_weight must be sharded by Shard(0) over a mesh of one dimension where all "
            f"ranks have the same tokens, got {list(weight.placements)} over a mesh of "
            f"{list(weight.device_mesh.shape)}; redistribute it, or with FSDP2 on top compute the "
            "loss inside of the wrapped forward"
        )
    return axes[0]


def _vocabulary_parallel(x: Shardable, weight: DTensor, axis: int, mapped: bool) -> Shardable:
    mesh = weight.device_mesh
    group = mesh.get_group(axis)
    if x.group is not None and x.group.group_name != group.group_name:
        raise ValueError(
            "group must be None or the group over which student_weight is sharded, "
            f"{group.group_name!r}, got {x.group.group_name!r}"
        )
    if mapped:
        raise ValueError(
            "student_ids do not go with a head that is sharded over the vocabulary; pass "
            "student_weight.full_tensor() and student_hidden as plain tensors"
        )
    hidden = x.student_hidden
    if isinstance(hidden, DTensor) and hidden.device_mesh != mesh:
        raise ValueError(
            f"student_hidden must be on the mesh of student_weight, {mesh}, got one on "
            f"{hidden.device_mesh}"
        )
    rows = min(weight.shape[0], x.teacher_weight.shape[0])
    classes = rows if x.num_classes is None else x.num_classes
    if not 0 < classes <= rows:
        raise ValueError(
            f"num_classes must be from 1 to {rows}, the rows that student_weight and "
            f"teacher_weight share, got {classes}"
        )
    own = _shard(weight, axis, mesh.get_local_rank(axis))
    last = _shard(weight, axis, mesh.size(axis) - 1)
    if last.start >= classes:
        raise ValueError(
            f"student_weight has no row of the {classes} classes on the last of "
            f"{mesh.size(axis)} ranks; use fewer ranks, or shard a head without padding"
        )
    if weight.to_local().shape[0] != own.stop - own.start:
        raise ValueError(
            "student_weight must be sharded in equal parts, as distribute_tensor does: this rank "
            f"should have {own.stop - own.start} rows of {weight.shape[0]}, and has "
            f"{weight.to_local().shape[0]}"
        )
    part = slice(own.start, min(own.stop, classes))
    labels = _replicated("labels", x.labels)
    if labels is not None:
        labels = _labels_of(labels, part, classes)
    if x.weight_grad is not None:
        check_weight_grad(weight, x.weight_grad, "student_weight")
    grad: Any = x.weight_grad
    return Shardable(
        student_hidden=replicated("student_hidden", hidden),
        student_weight=weight.to_local() if grad is None else _LocalWithoutGradient.apply(weight),
        student_bias=_bias_of(x.student_bias, weight, own),
        teacher_hidden=replicated("teacher_hidden", x.teacher_hidden),
        teacher_weight=_rows_of("teacher_weight", x.teacher_weight, weight, part),
        teacher_bias=(
            None
            if x.teacher_bias is None
            else _rows_of("teacher_bias", x.teacher_bias, weight, part)
        ),
        token_weights=_replicated("token_weights", x.token_weights),
        labels=labels,
        num_classes=part.stop - part.start,
        weight_grad=None if grad is None else grad.to_local(),
        group=group,
    )


class _LocalWithoutGradient(torch.autograd.Function):
    """This rank's part of a head whose gradient goes to `weight_grad`: the op returns none.

    In PyTorch 2.11 the backward of `to_local` makes zeros of that.
    """

    @staticmethod
    def forward(ctx, weight: DTensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        return weight.to_local().detach()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        assert gradient is None
        return None


def _shard(weight: DTensor, axis: int, rank: int) -> slice:
    """The rows that a rank has, in parts of the same size but for the last ones."""
    rows, ranks = weight.shape[0], weight.device_mesh.size(axis)
    each = -(-rows // ranks)
    return slice(min(rows, each * rank), min(rows, each * (rank + 1)))


def _labels_of(labels: Tensor, part: slice, classes: int) -> Tensor:
    """Labels as `group` takes them: numbered within the rank that owns them."""
    check_label_values(labels, classes, sharded=False)
    owned = (labels >= part.start) & (labels < part.stop)
    # What is no class stays none, for the GPU, where values are not checked.
    wrong = (labels >= classes) | ((labels < 0) & (labels != IGNORED_LABEL))
    elsewhere = torch.where(wrong, part.stop - part.start, _OTHER_RANK)
    elsewhere = torch.where(labels == IGNORED_LABEL, IGNORED_LABEL, elsewhere)
    return torch.where(owned, labels - part.start, elsewhere)


def _bias_of(bias: Tensor | None, weight: DTensor, own: slice) -> Tensor | None:
    """The student's bias for this rank's rows."""
    if bias is None:
        return None
    if isinstance(bias, DTensor):
        if bias.device_mesh != weight.device_mesh or bias.placements != weight.placements:
            raise ValueError(
                "student_bias must have the mesh and placements of student_weight, "
                f"{list(weight.placements)}, got {list(bias.placements)}"
            )
        return bias.to_local()
    if bias.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "student_bias must be a DTensor as student_weight is if it is trained: each rank would "
            "give a plain one the gradient of its own rows only"
        )
    return bias[own]


def _rows_of(name: str, tensor: Tensor, student: DTensor, part: slice) -> Tensor:
    """Rows `part` of the teacher's head, or of its bias."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        same = tensor.device_mesh == student.device_mesh and tensor.placements == student.placements
        # Heads padded to other sizes are cut in other places.
        if same and tensor.shape[0] == student.shape[0]:
            return tensor.to_local()
        return gathered(name, tensor, tensor.dtype, True)[part].clone()  # frees the other rows
    return tensor[part]
