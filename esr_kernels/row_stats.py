"""Statistics of one token's row of logits, and how parts of a row merge into the whole.

A *part* is a range of classes: a vocabulary tile, a split of a row over GPU programs, or another
rank's shard. Each part reports its maximum, the log of its sum relative to that maximum, and its
own softmax-weighted means; parts merge by weighing the means with their share of the row: a sum in
a fixed order, no atomics. Maximum and log-sum stay apart because the divergence of two models that
nearly agree is the difference of their log-sum-exps, which adding the maximum would round away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esr_kernels.divergences import Divergence

# Columns of a part's statistics, all fp32, in pairs (student, teacher). s, t: transformed logits;
# p, q: their softmax within the part.
MAX = slice(0, 2)  # max s, max t
LOG_SUM = slice(2, 4)  # log sum exp(s - max s), ...
GAP = slice(4, 6)  # sum p (t - s), sum q (t - s)
CENTRED = slice(6, 8)  # sum p (s - max s), sum q (t - max t)
ARGMAX = slice(8, 10)  # first class of the maximum, exact as a float below 2**24
COLUMNS = 10


@dataclass(frozen=True)
class LogitTransform:
    """softcap * tanh(scale * (h W^T + b) / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """d(transformed)/d(raw), but for the factor 1 - tanh^2 of a softcap."""
        return self.scale / self.temperature


@dataclass(frozen=True)
class RowSpec:
    """What the row passes must know besides the logits."""

    divergence: Divergence
    student: LogitTransform
    teacher: LogitTransform


@dataclass(frozen=True)
class RowStats:
    """Statistics of whole rows, each [T] fp32. `gap` is t - s, before normalisation."""

    student_lse: Tensor
    teacher_lse: Tensor
    lse_gap: Tensor  # student_lse - teacher_lse: what turns t - s into log q - log p
    gap_under_student: Tensor
    gap_under_teacher: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor


def merge_parts(parts: Tensor) -> RowStats:
    """Merge [T, parts, COLUMNS] into the statistics of T whole rows."""
    maxima = parts[:, :, MAX]
    top, winner = maxima.max(dim=1)  # [T, 2]
    # A part with no class alive has maximum and log-sum -inf, and weighs 0.
    below_top = maxima - top[:, None]
    mass = (below_top + parts[:, :, LOG_SUM]).exp()
    total = mass.sum(dim=1)
    log_sum = total.log()
    weight = mass / total[:, None]
    centred = torch.where(weight == 0, 0.0, parts[:, :, CENTRED] + below_top)
    entropy = log_sum - (weight * centred).sum(dim=1)
    gap = (weight * parts[:, :, GAP]).sum(dim=1)
    argmax = parts[:, :, ARGMAX].gather(1, winner[:, None])[:, 0]
    difference = (top[:, 0] - top[:, 1]) + (log_sum[:, 0] - log_sum[:, 1])
    student_lse, teacher_lse = (top + log_sum).T.contiguous()
    return RowStats(
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        lse_gap=difference,
        gap_under_student=gap[:, 0],
        gap_under_teacher=gap[:, 1],
        student_entropy=entropy[:, 0],
        teacher_entropy=entropy[:, 1],
        agreement=(argmax[:, 0] == argmax[:, 1]).to(parts.dtype),
    )


def mixed_kl(stats: RowStats, forward: float, reverse: float) -> tuple[Tensor, Tensor]:
    """(divergence, sum of pulls) of each row, for forward * KL(q||p) + reverse * KL(p||q).

    The pull here is -forward * q - reverse * p * (t - s), in the unnormalised gap: the log-sum-exps
    cancel out of the gradient, so leaving them out spares a pass and their rounding.
    """
    value = -reverse * (stats.gap_under_student + stats.lse_gap)
    if forward:
        value = value + forward * (stats.gap_under_teacher + stats.lse_gap)
    return value, -forward - reverse * stats.gap_under_student
