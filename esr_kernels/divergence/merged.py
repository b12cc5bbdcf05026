"""Several classes as one: what `merge_student_ids` and `merge_teacher_ids` do.

The probability of an event that several classes make up is the sum of theirs, and the log of that
sum is a log-sum-exp of logits: the merged class is one more class, with the logits

    s_g = log sum_j exp(s_j) over the student's members j,  t_g likewise over the teacher's.

The members are taken out of the row passes by a bias of -inf. Their logits, few for each token,
come from a product of their own with the rows of the head; s_g and t_g enter each row as one more
part of its statistics. The gradient of s_g is that of any class, and a member's share of it is its
softmax within the group: ds_g/ds_j = exp(s_j - s_g). A member may lie outside of the classes that
the models share: the other model has no such class, but its probability is part of the event.

Cost: a few operations on [tokens, members] for each call, not for each chunk, and a temporary bias
for each model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.tiles import row_blocks
from esr_kernels.common.transform import LogitTransform, cap_, uncap_
from esr_kernels.divergence import rows_torch
from esr_kernels.divergence.call import Call, Operands
from esr_kernels.divergence.outputs import cross_entropy
from esr_kernels.divergence.statistics import (
    DIFFERENCE,
    MAX,
    RowNormalizers,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    merge_parts,
    row_normalizers,
    with_labels,
    without_second_pass,
)


@dataclass(frozen=True)
class MergedClass:
    """The merged class of some rows, and the operands of all other classes."""

    rest: Operands  # over the shared classes, without the members
    removal: Tensor  # [V] bias that is -inf at the members and else 0
    ids: tuple[int, ...]  # [k] rows of the student's head
    weight: Tensor  # [k, Ds] these rows
    s: Tensor  # [T] transformed logits of the merged class
    t: Tensor
    labelled: Tensor | None  # [T] whether the row's label is a member
    shares: Tensor  # [T, k] d(s)/d(a member's logit), but for the slope of the transform
    dz: Tensor  # [T, k] gradient with respect to the members' logits, which `set_dz` writes
    spec: RowSpec  # of logits that are transformed already

    def merge_parts(self, parts: Tensor, rows: slice = slice(None)) -> RowStats:
        """Statistics of whole rows from the parts [n, parts, COLUMNS] of all other classes.

        Where the merged class is the most probable one, as at the end of an answer, mean
        differences are taken relative to its own: what the gradient there is, the mean's distance
        from it, would else be lost in rounding.
        """
        own = self._part(rows)
        difference = own[:, 0, DIFFERENCE]
        leads = (own[:, :, MAX] >= parts[:, :, MAX].amax(1, keepdim=True))[:, 0]
        origin = torch.where(leads & difference.isfinite(), difference, 0.0)
        parts = torch.cat([parts, own], dim=1)
        parts[:, :, DIFFERENCE] -= origin[:, None]
        stats, (under_student, under_teacher) = merge_parts(parts), origin.unbind(1)
        return stats._replace(
            difference_under_student=stats.difference_under_student + under_student,
            difference_under_teacher=stats.difference_under_teacher + under_teacher,
        )

    def merge_rows(
        self, parts: Tensor, labels: Tensor | None, spec: RowSpec, rows: slice = slice(None)
    ) -> tuple[RowStats, Tensor | None, Tensor | None]:
        """`statistics.merge_rows` of the parts of all other classes."""
        stats = self.merge_parts(parts, rows)
        return stats, *without_second_pass(stats, labels, spec)

    def _part(self, rows: slice) -> Tensor:
        """Statistics [n, 1, COLUMNS] of the merged class; a number that no class has for argmax."""
        s, t = self.s[rows], self.t[rows]
        log_sums = (torch.where(z == -torch.inf, z, 0.0) for z in (s, t))
        difference, none = t - s, torch.zeros_like(s)
        number = torch.full_like(s, self.removal.shape[0])
        columns = (s, t, *log_sums, difference, difference, none, none, number, number)
        return torch.stack(columns, dim=1)[:, None]

    def pull_sums(self, stats: RowStats, rows: slice = slice(None)) -> Tensor:
        """The merged class's share of `tile_pull_sums` [n, 3]."""
        return rows_torch.tile_pull_sums(self._tile(rows), stats, self.spec)

    def set_dz(
        self, normalizers: RowNormalizers, row_weight: Tensor | None, rows: slice = slice(None)
    ) -> None:
        """Write the members' dz of rows whose normalizers are known."""
        tile = self._tile(rows)
        rows_torch.tile_gradient_(tile, normalizers, row_weight, self.spec, tile.s)
        self.dz[rows] = tile.s * self.shares[rows]

    def _tile(self, rows: slice) -> Tile:
        """The merged class as a tile of one class, which row passes may overwrite."""
        bias = self.s.new_zeros(1)  # it says that logits may be -inf
        labels = None if self.labelled is None else self.labelled[rows].long() - 1
        return Tile(self.s[rows, None].clone(), self.t[rows, None].clone(), bias, bias, labels)

    def stash_rows_(
        self, call: Call, tile: Tile, row_weight: Tensor | None, dz: Tensor, rows: slice
    ) -> tuple[Tensor, RowStats]:
        """`stash_rows_` of the row passes, for `rows` of all tokens; sets the members' dz too."""
        spec = call.spec
        parts = call.rows.tile_stats(tile, spec)
        stats, value, pull_sum = self.merge_rows(parts, tile.labels, spec, rows)
        if call.rows.TRANSFORMS_IN_PLACE:
            # What follows sees transformed logits, for which a bias of 0 or -inf changes nothing.
            tile = tile._replace(student_bias=self.removal, teacher_bias=self.removal)
            spec = self.spec
        if value is None or pull_sum is None:
            sums = call.rows.tile_pull_sums(tile, stats, spec) + self.pull_sums(stats, rows)
            value, pull_sum = from_pull_sums(sums)
            pull_sum = with_labels(pull_sum, tile.labels, spec)
        normalizers = row_normalizers(stats, pull_sum)
        if spec is self.spec and call.spec.student.softcap is not None:
            _gradient_behind_softcap_(call, tile, normalizers, row_weight, spec, dz)
        else:
            call.rows.tile_gradient_(tile, normalizers, row_weight, spec, dz)
        self.set_dz(normalizers, row_weight, rows)
        return value, stats

    def cross_entropy(self, x: Operands, stats: RowStats, call: Call) -> Tensor:
        """`outputs.cross_entropy` of the labels in `x`; one in the group means the merged class."""
        assert self.labelled is not None
        other = cross_entropy(x, stats, call)
        return torch.where(self.labelled, stats.student_lse - self.s, other)

    def add_hidden_gradient(self, out: Tensor, alpha: float) -> None:
        """out [T, Ds] += alpha * the members' dz @ their rows of the head."""
        matmul.hidden_gradient(self.dz, self.weight, out, alpha=alpha, accumulate=True)

    def add_bias_gradient(self, out: Tensor, alpha: float) -> None:
        """Add the members' gradient to that of the whole bias [Vs]."""
        for row, total in zip(self.ids, self.dz.sum(0, dtype=out.dtype), strict=True):
            out[row].add_(total, alpha=alpha)

    def set_weight_gradient(
        self, hidden: Tensor, out: Tensor, alpha: float, restore: Tensor | None, add: bool
    ) -> None:
        """Write (or add) the members' rows of the whole head's gradient [Vs, Ds]."""
        rows = torch.empty_like(self.weight, dtype=self.s.dtype)
        matmul.weight_gradient(self.dz, hidden, rows, alpha=alpha, accumulate=False)
        if restore is not None:
            rows.mul_(restore)
        for row, gradient in zip(self.ids, rows, strict=True):
            target = out[row]
            target.add_(gradient) if add else target.copy_(gradient)


def _gradient_behind_softcap_(
    call: Call,
    tile: Tile,
    normalizers: RowNormalizers,
    row_weight: Tensor | None,
    spec: RowSpec,
    dz: Tensor,
) -> None:
    """`tile_gradient_` of transformed logits, times the derivative of the student's softcap."""
    student = call.spec.student
    assert student.softcap is not None
    for rows in row_blocks(*tile.s.shape):
        block, weight = tile.rows(rows), None if row_weight is None else row_weight[rows]
        slope = block.s.mul(student.temperature / student.softcap).square_()
        slope.clamp_(max=1.0).neg_().add_(1.0)  # the logit of a removed class is -inf
        call.rows.tile_gradient_(block, normalizers.rows(rows), weight, spec, block.s)
        torch.mul(block.s, slope, out=dz[rows])


def merged_class(whole: Operands, x: Operands, call: Call) -> MergedClass:
    """The merged class of a call that has one.

    `whole` has both heads with all their rows, `x` is over the shared classes.
    """
    assert call.merge is not None
    student_ids, teacher_ids = call.merge
    spec, dtype = call.spec, matmul.logits_dtype(x.student_hidden.dtype)
    student = _members(
        whole.student_hidden, whole.student_weight, whole.student_bias, student_ids, spec.student
    )
    teacher = _members(
        whole.teacher_hidden, whole.teacher_weight, whole.teacher_bias, teacher_ids, spec.teacher
    )
    removed, alike = _removed(x, student_ids, teacher_ids, call.classes)
    removal = torch.zeros(call.classes, dtype=dtype, device=removed.device)
    removal.masked_fill_(removed, -torch.inf)
    s = torch.where(alike, student.z.logsumexp(1), torch.nan)
    within = torch.exp(student.z - torch.where(s == -torch.inf, 0.0, s)[:, None])
    rest = x._replace(
        student_bias=_without(removal, x.student_bias, spec.student),
        teacher_bias=_without(removal, x.teacher_bias, spec.teacher),
    )
    labelled = None
    if x.labels is not None:
        label = x.labels.clamp(0, call.classes - 1)
        labelled = (x.labels >= 0) & (x.labels < call.classes) & removed[label]
        # A label that no tile has: the row passes leave its pull to the merged class.
        rest = rest._replace(labels=torch.where(labelled, call.classes, x.labels))
    in_place = call.plan.problem.in_place
    return MergedClass(
        rest=rest,
        removal=removal,
        ids=student_ids,
        weight=student.weight,
        s=s,
        t=teacher.z.logsumexp(1),
        labelled=labelled,
        shares=within * student.slope,
        dz=torch.empty_like(within, dtype=dtype if in_place else x.student_hidden.dtype),
        spec=replace(spec, student=LogitTransform(), teacher=LogitTransform()),
    )


class _Members(NamedTuple):
    weight: Tensor  # [k, D]
    z: Tensor  # [T, k] transformed logits
    slope: Tensor  # [T, k] derivative of the softcap there; 1 without one


def _members(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    ids: tuple[int, ...],
    transform: LogitTransform,
) -> _Members:
    """Rows are taken by slices: ids in a tensor would be copied to a GPU in each call."""
    weight = torch.cat([head[row : row + 1] for row in ids])
    if bias is not None:
        bias = torch.cat([bias[row : row + 1] for row in ids]).detach()
    shape, dtype = (hidden.shape[0], len(ids)), matmul.logits_dtype(hidden.dtype)
    z = torch.empty(shape, dtype=dtype, device=hidden.device)
    matmul.project(hidden, weight, z)
    cap_(z, bias, transform)
    slope = torch.ones_like(z) if transform.softcap is None else 1.0 - z.square()
    uncap_(z, bias, transform)
    return _Members(weight, z, slope)


def _removed(
    x: Operands, student_ids: tuple[int, ...], teacher_ids: tuple[int, ...], classes: int
) -> tuple[Tensor, Tensor]:
    """([V] whether a shared class is a member, whether both models agree on it).

    They disagree only where vocabularies are mapped by ids on a GPU, which nobody checked.
    """
    by_student, by_teacher = (
        _is_one_of(rows, ids, classes, x.student_hidden.device)
        for rows, ids in ((x.student_ids, student_ids), (x.teacher_ids, teacher_ids))
    )
    return by_student | by_teacher, (by_student == by_teacher).all()


def _is_one_of(
    rows: Tensor | None, ids: tuple[int, ...], classes: int, device: torch.device
) -> Tensor:
    """[V] whether the row of a class is one of `ids`; row c for class c where `rows` is None."""
    found = torch.zeros(classes, dtype=torch.bool, device=device)
    for row in ids:
        if rows is not None:
            found |= rows == row
        elif row < classes:
            found[row].fill_(True)
    return found


def _without(removal: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """The bias [V] that removes the members, under a negative scale too."""
    if bias is None and transform.scale > 0:
        return removal
    bias = removal.new_zeros(removal.shape) if bias is None else bias.detach()
    lowest = -torch.inf if transform.scale > 0 else torch.inf
    return bias.masked_fill(removal == -torch.inf, lowest)
