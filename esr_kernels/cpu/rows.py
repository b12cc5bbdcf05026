"""Row passes on CPU in compiled C, with the signatures of `rows_torch`.

fp32 only, and no divergences defined outside of this package: see `serves`.

A row is read once from memory and about three times from the cache; PyTorch's operations touch it
some fifteen times. Sums run in fp32 within blocks of 256 classes and in double across them.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from esr_kernels.common.transform import LogitTransform
from esr_kernels.cpu.library import over_rows
from esr_kernels.divergence.losses import (
    JSD,
    Divergence,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.divergence.statistics import (
    COLUMNS,
    IGNORED_LABEL,
    RowNormalizers,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    merge_parts,
    mixed_kl,
    row_normalizers,
)

_Pointer = ctypes.c_void_p


class _Transform(ctypes.Structure):
    _fields_ = [
        ("bias", _Pointer),
        ("slope", ctypes.c_float),
        ("inner", ctypes.c_float),
        ("outer", ctypes.c_float),
    ]


class _Known(ctypes.Structure):
    _fields_ = [
        ("student_lse", _Pointer),
        ("teacher_lse", _Pointer),
        ("lse_gap", _Pointer),
        ("pull_sum", _Pointer),
        ("student_residual", _Pointer),
        ("teacher_residual", _Pointer),
    ]


class _Tile(ctypes.Structure):
    _fields_ = [
        ("s", _Pointer),
        ("t", _Pointer),
        ("s_stride", ctypes.c_int64),
        ("t_stride", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("student", _Transform),
        ("teacher", _Transform),
        ("kind", ctypes.c_int32),
        ("a", ctypes.c_float),
        ("b", ctypes.c_float),
        ("row_weight", _Pointer),
        ("labels", _Pointer),
        ("label_weight", ctypes.c_float),
        ("label_pull", ctypes.c_float),
        ("ignored_label", ctypes.c_int64),
        ("known", _Known),
        ("parts", _Pointer),
        ("sums", _Pointer),
    ]


def _kind(divergence: Divergence) -> tuple[int, float, float] | None:
    """(kind, a, b) as rows_native.c numbers them; None for a divergence that it does not know."""
    mix = divergence.kl_weights
    if mix is not None:
        return 0, *mix
    if type(divergence) is JSD:
        return 1, divergence.beta, 0.0
    if type(divergence) is SkewForwardKL:
        return 2, divergence.alpha, 0.0
    if type(divergence) is SkewReverseKL:
        return 3, divergence.alpha, 0.0
    return (4, 0.0, 0.0) if type(divergence) is TotalVariation else None


class _Call:
    """The arguments of one call; holds on to the tensors that they point into."""

    def __init__(self, tile: Tile, row_weight: Tensor | None, spec: RowSpec) -> None:
        self._kept: list[Tensor] = [tile.s, tile.t]
        self.rows, self.classes = tile.s.shape
        kind = _kind(spec.divergence)
        assert kind is not None
        self.tile = _Tile(
            s=tile.s.data_ptr(),
            t=tile.t.data_ptr(),
            s_stride=tile.s.stride(0),
            t_stride=tile.t.stride(0),
            classes=self.classes,
            student=self._transform(spec.student, tile.student_bias),
            teacher=self._transform(spec.teacher, tile.teacher_bias),
            kind=kind[0],
            a=kind[1],
            b=kind[2],
            row_weight=self._pointer(row_weight, torch.float32),
            labels=self._pointer(tile.labels, torch.int64),
            label_weight=spec.label_weight,
            label_pull=-spec.label_weight,
            ignored_label=IGNORED_LABEL,
        )

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.to(dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _transform(self, transform: LogitTransform, bias: Tensor | None) -> _Transform:
        softcap, temperature = transform.softcap, transform.temperature
        return _Transform(
            bias=self._pointer(bias, torch.float32),
            slope=transform.slope,
            inner=0.0 if softcap is None else transform.scale / softcap,
            outer=0.0 if softcap is None else softcap / temperature,
        )

    def run(
        self,
        name: str,
        *,
        known: RowNormalizers | None = None,
        parts: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        if known is not None:
            self.tile.known = _Known(*(self._pointer(field, torch.float32) for field in known))
        self.tile.parts = self._pointer(parts, torch.float32)
        self.tile.sums = self._pointer(sums, torch.float32)
        over_rows(name, self.tile, self.rows, self.classes)


def serves(divergence: Divergence, dtype: torch.dtype) -> bool:
    """Whether logits of `dtype` and this divergence are what the C computes."""
    return dtype != torch.float64 and _kind(divergence) is not None


def tile_stats(tile: Tile, spec: RowSpec) -> Tensor:
    """Statistics [n, 1, COLUMNS] of a tile of classes; overwrites the logits."""
    parts = tile.s.new_empty(tile.s.shape[0], 1, COLUMNS)
    _Call(tile, None, spec).run("tile_stats", parts=parts)
    return parts


def tile_pull_sums(tile: Tile, stats: RowStats, spec: RowSpec) -> Tensor:
    """Sums [n, 3] over a tile of summands, pulls and p, for divergences that take two passes."""
    sums = tile.s.new_empty(tile.s.shape[0], 3)
    # The sum of pulls is what is asked for: any will do.
    known = row_normalizers(stats, stats.lse_difference, None, spec)
    _Call(tile, None, spec).run("tile_pull_sums", known=known, sums=sums)
    return sums


def tile_gradient_(
    tile: Tile, known: RowNormalizers, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> None:
    """Write dz [n, V] of a tile whose rows are known; `dz` may be `tile.s`."""
    _Call(tile, row_weight, spec).run("tile_gradient", known=known)
    if dz is not tile.s:
        dz.copy_(tile.s)


def stash_rows_(
    tile: Tile, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `tile.s`."""
    n, mix = tile.s.shape[0], spec.divergence.kl_weights
    parts = tile.s.new_empty(n, 1, COLUMNS)
    sums = tile.s.new_empty(n if mix is None else 0, 3)
    _Call(tile, row_weight, spec).run("stash_rows", parts=parts, sums=sums)
    if dz is not tile.s:
        dz.copy_(tile.s)
    stats = merge_parts(parts)
    value, _ = from_pull_sums(sums) if mix is None else mixed_kl(stats, *mix)
    return value, stats
