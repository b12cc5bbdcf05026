"""Statistics of one token's row of logits, and their merge.

Each part of a row (see `common.online_softmax`) has ten statistics, five for each model. Parts of
any kind are merged here: tiles of classes, splits over GPU programs, shards of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common.online_softmax import shares, weighted_mean
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.losses import Divergence, KernelForm, kernel_form

# Columns of a part's statistics, all fp32, in pairs (student, teacher). s, t: transformed logits;
# p, q: their softmax within the part.
MAX = slice(0, 2)  # max s, max t
LOG_SUM = slice(2, 4)  # log sum exp(s - max s), ...
DIFFERENCE = slice(4, 6)  # sum p (t - s), sum q (t - s)
CENTRED = slice(6, 8)  # sum p (s - max s), sum q (t - max t)
ARGMAX = slice(8, 10)  # first class of the maximum on this rank, exact below 2**24
COLUMNS = 10

IGNORED_LABEL = -100


@dataclass(frozen=True)
class RowSpec:
    """The arguments of the row passes besides the logits."""

    divergence: Divergence
    student: LogitTransform
    teacher: LogitTransform
    label_weight: float = 0.0

    @cached_property
    def form(self) -> KernelForm | None:
        """The divergence as compiled row passes take it; None if they do not have it."""
        return kernel_form(self.divergence)


class Tile(NamedTuple):
    """Raw logits of some rows over a range of classes. Row passes may overwrite them.

    `labels` are counted from the tile's first class; a label outside of it belongs to another tile.
    """

    s: Tensor  # [n, V] student, fp32 or fp64
    t: Tensor  # [n, V] teacher
    student_bias: Tensor | None = None  # [V]
    teacher_bias: Tensor | None = None
    labels: Tensor | None = None  # [n] int64

    def rows(self, rows: slice) -> Tile:
        labels = None if self.labels is None else self.labels[rows]
        return self._replace(s=self.s[rows], t=self.t[rows], labels=labels)

    @property
    def may_be_infinite(self) -> bool:
        """Whether a bias may have removed classes by -inf."""
        return self.student_bias is not None or self.teacher_bias is not None


class RowStats(NamedTuple):
    """Statistics of whole rows, each [T] fp32. `difference` is t - s, before normalisation.

    A log-sum-exp is rounded to the precision of its logits. That changes all probabilities of the
    row by some 1e-6 in the same direction; with the residual of the rounding, by 1e-7.
    """

    student_lse: Tensor
    teacher_lse: Tensor
    lse_difference: Tensor  # student_lse - teacher_lse; added to t - s it gives log q - log p
    difference_under_student: Tensor
    difference_under_teacher: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    student_residual: Tensor  # rounding error of student_lse
    teacher_residual: Tensor


def _merge(parts: Tensor) -> tuple[Tensor, Tensor]:
    """([T, COLUMNS], the part that has each model's maximum [T, 2]) of [T, parts, COLUMNS]."""
    maxima = parts[:, :, MAX]
    top, winner = maxima.max(dim=1)  # [T, 2]
    below_top, weight, total = shares(maxima, parts[:, :, LOG_SUM], top)
    share = weight / total[:, None]
    centred = weighted_mean(share, parts[:, :, CENTRED] + below_top)
    difference = weighted_mean(share, parts[:, :, DIFFERENCE])
    argmax = parts[:, :, ARGMAX].gather(1, winner[:, None])[:, 0]
    return torch.cat([top, total.log(), difference, centred, argmax], dim=1), winner


def merge_to_part(parts: Tensor) -> Tensor:
    """Merge [T, parts, COLUMNS] into one part [T, COLUMNS], which a rank sends to the others."""
    merged, _ = _merge(parts)
    # A rank without a finite logit has no mass, where the merge computes 0/0.
    dead = merged[:, MAX] == -torch.inf
    merged[:, LOG_SUM].masked_fill_(dead, -torch.inf)
    merged[:, DIFFERENCE].masked_fill_(dead, 0.0)
    merged[:, CENTRED].masked_fill_(dead, 0.0)
    return merged


def merge_parts(parts: Tensor) -> RowStats:
    """Merge [T, parts, COLUMNS] into the statistics of T whole rows."""
    merged, winner = _merge(parts)
    top, log_sum, difference = merged[:, MAX], merged[:, LOG_SUM], merged[:, DIFFERENCE]
    entropy = log_sum - merged[:, CENTRED]
    argmax = merged[:, ARGMAX]
    same_class = (winner[:, 0] == winner[:, 1]) & (argmax[:, 0] == argmax[:, 1])
    lse = top + log_sum
    # Knuth's two-sum: the rounding error of the addition.
    added = lse - top
    residual = (top - (lse - added)) + (log_sum - added)
    student_lse, teacher_lse = lse.T.contiguous()
    return RowStats(
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        lse_difference=part_lse_difference(merged),
        difference_under_student=difference[:, 0],
        difference_under_teacher=difference[:, 1],
        student_entropy=entropy[:, 0],
        teacher_entropy=entropy[:, 1],
        agreement=same_class.to(parts.dtype),
        student_residual=residual[:, 0],
        teacher_residual=residual[:, 1],
    )


def merge_rows(
    parts: Tensor, labels: Tensor | None, spec: RowSpec
) -> tuple[RowStats, Tensor | None, Tensor | None]:
    """(statistics, divergence [T], sum of pulls [T] with the labels') of [T, parts, COLUMNS].

    The last two are None for a divergence that takes a second pass.
    """
    stats = merge_parts(parts)
    return stats, *without_second_pass(stats, labels, spec)


def without_second_pass(
    stats: RowStats, labels: Tensor | None, spec: RowSpec
) -> tuple[Tensor | None, Tensor | None]:
    """The last two results of `merge_rows`."""
    mix = spec.divergence.kl_weights
    if mix is None:
        return None, None
    value, pull_sum = mixed_kl(stats, *mix)
    return value, with_labels(pull_sum, labels, spec)


class RowNormalizers(NamedTuple):
    """The statistics of whole rows that a gradient pass needs, each [T]."""

    student_lse: Tensor
    teacher_lse: Tensor
    lse_difference: Tensor
    pull_sum: Tensor  # of the divergence and the labels together
    student_residual: Tensor
    teacher_residual: Tensor

    def rows(self, rows: slice) -> RowNormalizers:
        return RowNormalizers(*(field[rows] for field in self))


def row_normalizers(stats: RowStats, pull_sum: Tensor) -> RowNormalizers:
    """The normalizers of rows with the sum of pulls `pull_sum` [T], that of the labels included."""
    return RowNormalizers(
        stats.student_lse,
        stats.teacher_lse,
        stats.lse_difference,
        pull_sum,
        stats.student_residual,
        stats.teacher_residual,
    )


def with_labels(pull_sum: Tensor, labels: Tensor | None, spec: RowSpec) -> Tensor:
    """The sum of pulls [T] and that of the cross-entropy: -weight at the label, else 0."""
    if labels is None:
        return pull_sum
    return torch.add(pull_sum, labels != IGNORED_LABEL, alpha=-spec.label_weight)


def part_lse_difference(part: Tensor) -> Tensor:
    """`RowStats.lse_difference` of rows that are a single part [T, COLUMNS]."""
    top, log_sum = part[:, MAX], part[:, LOG_SUM]
    return (top[:, 0] - top[:, 1]) + (log_sum[:, 0] - log_sum[:, 1])


def from_pull_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(divergence, sum of pulls) of each row from the sums [T, 3] of summands, pulls and p.

    p comes from a rounded log-sum-exp and adds up to 1 only within 1e-6; the gradient of equal
    models is 0 only if its sum of pulls is over the same p.
    """
    value, pull, mass = sums.unbind(1)
    return value, pull / mass


def mixed_kl(stats: RowStats, forward: float, reverse: float) -> tuple[Tensor, Tensor]:
    """(divergence, sum of pulls) of each row, for forward * KL(q||p) + reverse * KL(p||q).

    The pull is -forward * q - reverse * p * (t - s), without normalisation: the log-sum-exps cancel
    in the gradient, and leaving them out saves a pass and their rounding.
    """
    value = torch.zeros_like(stats.lse_difference)
    # A term of weight 0 is left out, not multiplied: it is infinite if a model lacks a class.
    if reverse:
        value = value - reverse * (stats.difference_under_student + stats.lse_difference)
    if forward:
        value = value + forward * (stats.difference_under_teacher + stats.lse_difference)
    return value, mixed_kl_pull_sum(stats.difference_under_student, forward, reverse)


def mixed_kl_pull_sum(difference_under_student: Tensor, forward: float, reverse: float) -> Tensor:
    """Sum of the pulls of `mixed_kl`."""
    if not reverse:
        return torch.full_like(difference_under_student, -forward)
    return -forward - reverse * difference_under_student
