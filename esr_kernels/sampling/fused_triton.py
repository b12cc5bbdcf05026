"""Sampling fused into the head's projection, in Triton: no logits are written to memory.

One program computes a tile of 256 classes for a block of rows. The matrix product over D
accumulates the tile's logits in registers, fp32, classes along the long side (64 rows fill a matrix
instruction's short side, and one row costs what 64 do: the head's bytes). The epilogue reduces them
to their maximum and log-sum. The draw (`draw_triton.draw`) chooses a tile for each row from those
and computes its 256 logits again, for that row alone.

Bytes  The head once for every block of rows, from memory where the programs of a tile, which are
       neighbours, share it in the cache; 8 bytes a row and tile written and read. The draw reads
       256 rows of the head for each row of the batch: B / 594 of a Qwen head again.
       Separate kernels would move 8 bytes a logit, written and read.
FLOPs  2 B V D, padded to whole blocks of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.calibration import rates_of
from esr_kernels.common.launch import ceil_div, launch
from esr_kernels.common.projection_triton import (
    check_fused,
    current_arch,
    operand_kind,
    project,
)
from esr_kernels.sampling.draw_triton import draw
from esr_kernels.sampling.params import TILE, Classes, RowParams, Sample
from esr_kernels.sampling.philox import SampleKeys
from esr_kernels.sampling.tiles_triton import (
    empties,
    inverse_temperature,
    kernel_transform,
    tile_logsumexp,
    transform_valid,
)


class Blocks(NamedTuple):
    """Rows of a program, columns of D at a time; the classes are a tile."""

    rows: int
    depth: int
    warps: int
    stages: int


# (operand, arch) -> block, keyed on nothing that changes from step to step, so that a row's sums
# are the same in any batch. A program is limited by loading the head: a stage takes
# (256 + 64) * 64 * 2 bytes, 40 KiB, and the stages in flight must hide the latency of memory. 64
# rows take 64 registers of accumulators a thread.
#   sm_90, sm_100  4 stages, 160 of 227 KiB.
#   sm_80          3 stages, 120 of 163 KiB.
#   gfx942         one stage in LDS (40 of 64 KiB), one in registers.
#   fp32           32 columns of D are as many bytes.
#   unaligned      rows that do not start at 16 bytes arrive element by element, through registers.
BLOCKS: dict[tuple[str, str], Blocks] = {
    ("16-bit", "sm_80"): Blocks(64, 64, 8, 3),
    ("16-bit", "sm_90"): Blocks(64, 64, 8, 4),
    ("16-bit", "sm_100"): Blocks(64, 64, 8, 4),
    ("16-bit", "gfx942"): Blocks(64, 64, 8, 2),
    ("fp32", "sm_80"): Blocks(32, 32, 8, 3),
    ("fp32", "sm_90"): Blocks(32, 32, 8, 4),
    ("fp32", "sm_100"): Blocks(32, 32, 8, 4),
    ("fp32", "gfx942"): Blocks(64, 32, 8, 2),
    ("unaligned", "sm_80"): Blocks(32, 32, 8, 2),
    ("unaligned", "sm_90"): Blocks(32, 32, 8, 2),
    ("unaligned", "sm_100"): Blocks(32, 32, 8, 2),
    ("unaligned", "gfx942"): Blocks(32, 32, 8, 2),
}
# Up to this D a draw counts as narrow (`calibration.Rates`).
_NARROW = 2048


def is_faster(rows: int, depth: int, device: str) -> bool:
    """Whether fusing is chosen over a projection and passes over its logits."""
    rates, _ = rates_of(device)
    return rows <= (rates.draw_rows if depth <= _NARROW else rates.draw_rows_wide)


@triton.jit(do_not_specialize=["n_rows"])
def _fused_tiles_kernel(
    operands,
    transform,
    statistics,
    n_rows,
    n_classes,
    n_tiles,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.program_id(1)
    classes = tile * TILE + tl.arange(0, TILE)
    # Rows and classes beyond the last repeat it: loads need no mask, and what they compute is
    # dropped at the store and by the -inf.
    live_rows = tl.minimum(rows, n_rows - 1)
    live_classes = tl.minimum(classes, n_classes - 1)
    z = project(operands, live_classes, live_rows, BLOCK_D)
    inv_temperature = inverse_temperature(transform, live_rows[None, :])
    inside = (classes < n_classes)[:, None]
    z = transform_valid(z, classes[:, None], inside, transform, inv_temperature)
    maxima, log_sums = tile_logsumexp(z, 0)
    maxima_ptr, log_sums_ptr = statistics
    out = rows.to(tl.int64) * n_tiles + tile
    tl.store(maxima_ptr + out, maxima, mask=rows < n_rows)
    tl.store(log_sums_ptr + out, log_sums, mask=rows < n_rows)


def tile_statistics(
    hidden: Tensor,
    weight: Tensor,
    classes: Classes,
    params: RowParams,
    blocks: Blocks | None = None,
) -> tuple[Tensor, Tensor]:
    """Maxima and log-sums [B, tiles] fp32 of the logits hidden @ weight.T, without those logits.

    hidden [B, D] and weight [V, D] of one dtype, bf16, fp16 or fp32; `blocks` None takes the
    committed ones of the operands' dtype and the GPU.
    """
    check_fused("", hidden, weight)
    blocks = blocks or BLOCKS[operand_kind(weight), current_arch(hidden)]
    rows, tiles = hidden.shape[0], ceil_div(classes.count, TILE)
    maxima, log_sums = empties(2, rows, tiles, like=hidden)
    if rows:
        launch(_fused_tiles_kernel, (ceil_div(rows, blocks.rows), tiles), hidden)(
            # Head and hidden states are swapped: classes are the long side.
            (weight, hidden, None, weight.stride(0), hidden.stride(0), hidden.shape[1]),
            transform=kernel_transform(classes, params),
            statistics=(maxima, log_sums),
            n_rows=rows,
            n_classes=classes.count,
            n_tiles=tiles,
            TILE=TILE,
            BLOCK_B=blocks.rows,
            BLOCK_D=blocks.depth,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return maxima, log_sums


def sample(
    hidden: Tensor, weight: Tensor, classes: Classes, params: RowParams, keys: SampleKeys
) -> Sample:
    """Draw from hidden @ weight.T without filters, as `draw_triton.sample_rows` draws."""
    statistics = tile_statistics(hidden, weight, classes, params)
    return draw(hidden, weight, classes, params, keys, statistics)
