"""Row passes over fp32 logits in C: the arithmetic that `esr_kernels.divergence` describes.

A row is read once from memory and about three times from the cache, where PyTorch's operations read
or write it some fifteen times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.cpu import structures
from esr_kernels.cpu.parallel_for import parallel_for


class RowTransform(NamedTuple):
    """softcap * tanh(scale * (z + bias) / softcap) / temperature."""

    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None
    temperature: float


@dataclass(frozen=True)
class RowPass:
    """Inputs of the passes over a tile of n rows and V classes, which overwrite its logits."""

    student: Tensor  # [n, V] raw logits, fp32, of unit stride in the rows
    teacher: Tensor
    student_transform: RowTransform
    teacher_transform: RowTransform
    kind: int  # of divergence, as in structures.h
    a: float
    b: float
    row_weight: Tensor | None  # [n]; None is 1
    labels: Tensor | None  # [n], counted from the tile's first class
    label_weight: float
    ignored_label: int

    def run(
        self,
        name: str,
        *,
        normalizers: Sequence[Tensor] = (),
        parts: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Run one pass of rows.c: "tile_stats", "tile_pull_sums", "tile_gradient" or "stash_rows".

        Args:
            normalizers: the fields [n] of `struct row_normalizers`, in order.
            parts, sums: fp32 outputs [n, 1, 10] and [n, 3], contiguous.
        """
        rows, classes = self.student.shape
        inputs = _Inputs()
        arguments = structures.RowPass(
            student=self.student.data_ptr(),
            teacher=self.teacher.data_ptr(),
            student_stride=self.student.stride(0),
            teacher_stride=self.teacher.stride(0),
            classes=classes,
            student_transform=inputs.transform(self.student_transform),
            teacher_transform=inputs.transform(self.teacher_transform),
            kind=self.kind,
            a=self.a,
            b=self.b,
            row_weight=inputs.pointer(self.row_weight, torch.float32),
            labels=inputs.pointer(self.labels, torch.int64),
            label_weight=self.label_weight,
            ignored_label=self.ignored_label,
            normalizers=structures.RowNormalizers(
                *(inputs.pointer(field, torch.float32) for field in normalizers)
            ),
            parts=None if parts is None else parts.data_ptr(),
            sums=None if sums is None else sums.data_ptr(),
        )
        parallel_for(name, arguments, rows, classes)


class _Inputs:
    """Converts input tensors, and keeps the copies alive until the pass has run."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.to(dtype).contiguous())
        return self._kept[-1].data_ptr()

    def transform(self, transform: RowTransform) -> structures.Transform:
        scale, softcap, temperature = transform.scale, transform.softcap, transform.temperature
        return structures.Transform(
            bias=self.pointer(transform.bias, torch.float32),
            slope=scale / temperature,
            inner=0.0 if softcap is None else scale / softcap,
            outer=0.0 if softcap is None else softcap / temperature,
        )
