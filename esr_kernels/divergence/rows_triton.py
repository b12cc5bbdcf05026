"""Row passes in Triton: the GPU path, with the signatures of `rows_torch`.

statistics  One program per (token, split of the row) reduces both models' logits to ten statistics.
            Reads 8 bytes an element.
pull sums   The second pass of JSD and the like: three sums. Reads 8 bytes an element.
gradient    One program per (token, block): reads 8 bytes an element, writes dz in its dtype.

A row is split over programs when there are too few tokens to fill the machine; parts merge in a
fixed order (`row_stats.merge_parts`), so a launch repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from esr_kernels.common.launch import split_columns
from esr_kernels.divergence.losses import (
    JSD,
    Divergence,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.divergence.row_kernels_triton import (
    gradient_kernel,
    pull_sums_kernel,
    row_statistics_kernel,
)
from esr_kernels.divergence.statistics import (
    COLUMNS,
    RowsKnown,
    RowSpec,
    RowStats,
    Tile,
    from_pull_sums,
    known_rows,
    merge_parts,
    mixed_kl,
)

# (columns in a block, warps), from bench/gpu_static.py: the statistics hold ten accumulators and
# both loads in registers; at 4 columns a thread 24 warps or more stay resident on sm_90 and gfx942
# (72-79 registers), at 8 columns 12. The other passes hold less and take 8.
STATISTICS_BLOCK = (512, 4)
PULL_SUMS_BLOCK = (1024, 4)
GRADIENT_BLOCK = (1024, 4)


def _transform_arguments(tile: Tile, spec: RowSpec) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for prefix, transform, bias in (
        ("s", spec.student, tile.student_bias),
        ("t", spec.teacher, tile.teacher_bias),
    ):
        arguments[f"{prefix}_scale"] = float(transform.scale)
        arguments[f"{prefix}_softcap"] = float(transform.softcap or 1.0)
        arguments[f"{prefix}_inv_temperature"] = 1.0 / transform.temperature
        arguments[f"{prefix.upper()}_SOFTCAP"] = transform.softcap is not None
        arguments[f"{prefix}_bias_ptr"] = bias
        arguments[f"{prefix.upper()}_BIAS"] = bias is not None
    return arguments


def _kind(divergence: Divergence) -> tuple[int, float]:
    """(KIND of the kernels, the divergence's parameter)."""
    if divergence.kl_weights is not None:
        return 0, 0.0
    # Not isinstance: a subclass may compute something else.
    if type(divergence) is JSD:
        return 1, float(divergence.beta)
    if type(divergence) is SkewForwardKL:
        return 2, float(divergence.alpha)
    if type(divergence) is SkewReverseKL:
        return 3, float(divergence.alpha)
    if type(divergence) is TotalVariation:
        return 4, 0.0
    raise TypeError(
        f"divergence: the Triton row passes do not know {divergence!r}; use impl='torch'"
    )


def tile_stats(tile: Tile, spec: RowSpec) -> Tensor:
    """Statistics [n, splits, COLUMNS] of a tile of classes."""
    n, classes = tile.s.shape
    block, warps = STATISTICS_BLOCK
    splits, columns = split_columns(n, classes, block)
    parts = torch.empty(n, splits, COLUMNS, dtype=torch.float32, device=tile.s.device)
    if n:
        row_statistics_kernel[(n, splits)](
            tile.s,
            tile.t,
            tile.s.stride(0),
            tile.t.stride(0),
            parts_ptr=parts,
            n_cols=classes,
            split_cols=columns,
            BLOCK=block,
            N_STATS=COLUMNS,
            num_warps=warps,
            **_transform_arguments(tile, spec),
        )
    return parts


def tile_pull_sums(tile: Tile, stats: RowStats, spec: RowSpec) -> Tensor:
    """Sums [n, 3] over a tile of summands, pulls and p, for divergences that take two passes."""
    n, classes = tile.s.shape
    block, warps = PULL_SUMS_BLOCK
    splits, columns = split_columns(n, classes, block)
    sums = torch.empty(n, splits, 3, dtype=torch.float32, device=tile.s.device)
    kind, parameter = _kind(spec.divergence)
    if n:
        pull_sums_kernel[(n, splits)](
            tile.s,
            tile.t,
            tile.s.stride(0),
            tile.t.stride(0),
            s_lse_ptr=stats.student_lse.contiguous(),
            t_lse_ptr=stats.teacher_lse.contiguous(),
            lse_gap_ptr=stats.lse_gap.contiguous(),
            sums_ptr=sums,
            n_cols=classes,
            split_cols=columns,
            parameter=parameter,
            KIND=kind,
            BLOCK=block,
            num_warps=warps,
            **_transform_arguments(tile, spec),
        )
    return sums.sum(1)


def tile_gradient_(
    tile: Tile, known: RowsKnown, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> None:
    """Write dz [n, V] of a tile whose rows are known; `dz` may be `tile.s`."""
    n, classes = tile.s.shape
    forward, reverse = spec.divergence.kl_weights or (0.0, 0.0)
    kind, parameter = _kind(spec.divergence)
    block, warps = GRADIENT_BLOCK
    if n:
        gradient_kernel[(n, triton.cdiv(classes, block))](
            tile.s,
            tile.t,
            dz,
            tile.s.stride(0),
            tile.t.stride(0),
            dz.stride(0),
            s_lse_ptr=known.student_lse.contiguous(),
            t_lse_ptr=known.teacher_lse.contiguous(),
            lse_gap_ptr=known.lse_gap.contiguous(),
            pull_sum_ptr=known.pull_sum.contiguous(),
            weight_ptr=row_weight,
            label_ptr=tile.labels,
            n_cols=classes,
            forward=float(forward),
            reverse=float(reverse),
            parameter=parameter,
            label_weight=float(spec.label_weight),
            KIND=kind,
            HAS_FORWARD=forward != 0,
            HAS_REVERSE=reverse != 0,
            HAS_WEIGHT=row_weight is not None,
            HAS_LABELS=tile.labels is not None,
            BLOCK=block,
            num_warps=warps,
            **_transform_arguments(tile, spec),
        )


def stash_rows_(
    tile: Tile, row_weight: Tensor | None, spec: RowSpec, dz: Tensor
) -> tuple[Tensor, RowStats]:
    """(divergence [n], statistics) of whole rows; writes their dz [n, V], which may be `tile.s`."""
    stats = merge_parts(tile_stats(tile, spec))
    mix = spec.divergence.kl_weights
    if mix is not None:
        value, pull_sum = mixed_kl(stats, *mix)
    else:
        value, pull_sum = from_pull_sums(tile_pull_sums(tile, stats, spec))
    tile_gradient_(tile, known_rows(stats, pull_sum, tile.labels, spec), row_weight, spec, dz)
    return value, stats
