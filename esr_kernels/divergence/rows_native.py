"""Row passes in C on CPU, with the signatures of `rows_torch`.

Sums are fp32 within blocks of 256 classes and double across blocks.
"""

from __future__ import annotations

from torch import Tensor

from esr_kernels import cpu
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.losses import Divergence, kernel_form
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
from esr_kernels.divergence.statistics import merge_rows as merge_rows

# Statistics and pull sums leave the transformed logits where the raw ones were.
TRANSFORMS_IN_PLACE = True


def supports(divergence: Divergence) -> bool:
    """Whether the C has this divergence (for fp32 logits) and is available."""
    return kernel_form(divergence) is not None and cpu.is_available()


def tile_stats(tile: Tile, spec: RowSpec) -> Tensor:
    """Statistics [n, 1, COLUMNS] of a tile of classes; overwrites the logits."""
    parts = tile.s.new_empty(tile.s.shape[0], 1, COLUMNS)
    _row_pass(tile, None, spec).run("tile_stats", parts=parts)
    return parts


def tile_pull_sums(tile: Tile, stats: RowStats, spec: RowSpec) -> Tensor:
    """Sums [n, 3] over a tile of summands, pulls and p, for divergences that take two passes."""
    sums = tile.s.new_empty(tile.s.shape[0], 3)
    # This pass does not read the sum of pulls, so the tensor in its place does not matter.
    normalizers = row_normalizers(stats, stats.lse_difference)
    _row_pass(tile, None, spec).run("tile_pull_sums", normalizers=normalizers, sums=sums)
    return sums


def tile_gradient_(
    tile: Tile,
    normalizers: RowNormalizers,
    row_weight: Tensor | None,
    spec: RowSpec,
    dz: Tensor,
) -> None:
    """Write dz [n, V] of a tile; `dz` may be `tile.s`."""
    _row_pass(tile, row_weight, spec).run("tile_gradient", normalizers=normalizers)
    if dz is not tile.s:
        dz.copy_(tile.s)


def stash_rows_(
    tile: Tile, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `tile.s`."""
    n, mix = tile.s.shape[0], spec.divergence.kl_weights
    parts = tile.s.new_empty(n, 1, COLUMNS)
    sums = tile.s.new_empty(n if mix is None else 0, 3)
    _row_pass(tile, row_weight, spec).run("stash_rows", parts=parts, sums=sums)
    if dz is not tile.s:
        dz.copy_(tile.s)
    stats = merge_parts(parts)
    value, _ = from_pull_sums(sums) if mix is None else mixed_kl(stats, *mix)
    return value, stats


def _row_pass(tile: Tile, row_weight: Tensor | None, spec: RowSpec) -> cpu.RowPass:
    form = spec.form
    assert form is not None
    return cpu.RowPass(
        student=tile.s,
        teacher=tile.t,
        student_transform=_transform(spec.student, tile.student_bias),
        teacher_transform=_transform(spec.teacher, tile.teacher_bias),
        kind=form.kind,
        a=form.a,
        b=form.b,
        row_weight=row_weight,
        labels=tile.labels,
        label_weight=spec.label_weight,
        ignored_label=IGNORED_LABEL,
    )


def _transform(transform: LogitTransform, bias: Tensor | None) -> cpu.RowTransform:
    return cpu.RowTransform(bias, transform.scale, transform.softcap, transform.temperature)
