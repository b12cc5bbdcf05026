"""Statistics of one token's row of logits, and how parts of a row merge into the whole.

A *part* is a range of classes: a vocabulary tile, a split of a row over GPU programs, or another
rank's shard. Each part reports its own softmax-weighted means, so that parts merge by weighing
them with exp(lse_part - lse): a fixed-order sum, no atomics, the same on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esr_kernels.divergences import Divergence

# Columns of a part's statistics, all fp32. s, t: transformed student and teacher logits.
STUDENT_LSE = 0  # log sum exp(s)
TEACHER_LSE = 1  # log sum exp(t)
GAP_UNDER_STUDENT = 2  # sum softmax(s) * (t - s)
GAP_UNDER_TEACHER = 3  # sum softmax(t) * (t - s)
LOGIT_UNDER_STUDENT = 4  # sum softmax(s) * s
LOGIT_UNDER_TEACHER = 5  # sum softmax(t) * t
STUDENT_MAX = 6  # max s
STUDENT_ARGMAX = 7  # its class, exact as a float below 2**24
TEACHER_MAX = 8
TEACHER_ARGMAX = 9
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
    gap_under_student: Tensor
    gap_under_teacher: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor

    @property
    def lse_gap(self) -> Tensor:
        """What turns t - s into log q - log p."""
        return self.student_lse - self.teacher_lse


def merge_parts(parts: Tensor) -> RowStats:
    """Merge [T, parts, COLUMNS] into the statistics of T whole rows."""
    lse = parts[:, :, :2].logsumexp(dim=1)  # [T, 2]
    if parts.shape[1] == 1:
        means = parts[:, 0, 2:6]
        student_argmax, teacher_argmax = parts[:, 0, STUDENT_ARGMAX], parts[:, 0, TEACHER_ARGMAX]
    else:
        # A part with no class alive has lse -inf and weighs 0.
        weight = (parts[:, :, :2] - lse[:, None, :]).exp()
        means = (parts[:, :, 2:6] * torch.cat([weight, weight], dim=2)).sum(dim=1)
        student_argmax, teacher_argmax = (
            parts[:, :, top + 1].gather(1, parts[:, :, top].argmax(1, keepdim=True))[:, 0]
            for top in (STUDENT_MAX, TEACHER_MAX)
        )
    student_lse, teacher_lse = lse.unbind(1)
    return RowStats(
        student_lse=student_lse,
        teacher_lse=teacher_lse,
        gap_under_student=means[:, 0],
        gap_under_teacher=means[:, 1],
        student_entropy=student_lse - means[:, 2],
        teacher_entropy=teacher_lse - means[:, 3],
        agreement=(student_argmax == teacher_argmax).to(lse.dtype),
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
