"""Row passes of `selected` in PyTorch: the CPU path.

They overwrite the raw logits of a tile, in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.common.tiles import row_blocks
from esr_kernels.common.transform import LogitTransform, cap_, uncap_
from esr_kernels.scoring.tile import CENTRED, COLUMNS, LOG_SUM, MAX, Tile, UnselectedGradient

# The least log-probability: its exponential is 0 in fp64, and unlike -inf it times 0 is 0.
_LEAST = -1000.0


def tile_statistics(
    tile: Tile,
    transform: LogitTransform,
    ids: Tensor,
    selected: Tensor,
    softcap_slope: Tensor | None,
) -> Tensor:
    """Statistics [T, 1, COLUMNS] of the classes of a tile that are not in `ids` [T, K].

    Writes the transformed logits of those that are to `selected` [T, K] and, with a softcap, its
    derivative 1 - tanh^2 there to `softcap_slope` [T, K].
    """
    z = tile.z
    parts = torch.empty(z.shape[0], 1, COLUMNS, dtype=z.dtype, device=z.device)
    for rows in row_blocks(*z.shape):
        block = z[rows]
        inside, columns = _columns(ids[rows], tile)
        cap_(block, tile.bias, transform)
        if softcap_slope is not None:
            slope = 1 - block.gather(1, columns).square()
            softcap_slope[rows] = torch.where(inside, slope, softcap_slope[rows])
        uncap_(block, tile.bias, transform)
        selected[rows] = torch.where(inside, block.gather(1, columns), selected[rows])
        _remove_(block, inside, columns)
        top = block.amax(1)
        empty = top == -torch.inf
        block.sub_(torch.where(empty, 0.0, top)[:, None]).clamp_(min=_LEAST)
        pi = block.softmax(1)
        part = parts[rows, 0]
        part[:, MAX] = top
        part[:, LOG_SUM] = torch.where(empty, -torch.inf, -pi.amax(1).log())
        part[:, CENTRED] = torch.linalg.vecdot(pi, block)
    return parts


def tile_gradient_(
    tile: Tile,
    transform: LogitTransform,
    ids: Tensor,
    selected_dz: Tensor,
    unselected: UnselectedGradient | None,
    dz: Tensor,
) -> None:
    """Write the gradient of a tile's raw logits to `dz` [T, w], which may be `tile.z`.

    With `unselected` None the unselected classes get 0, and the logits are not read.
    """
    z = tile.z
    for rows in row_blocks(*z.shape):
        block = z[rows]
        inside, columns = _columns(ids[rows], tile)
        if unselected is None:
            block.zero_()
        else:
            cap_(block, tile.bias, transform)
            slope = None if transform.softcap is None else block.square().neg_().add_(1.0)
            uncap_(block, tile.bias, transform)
            _remove_(block, inside, columns)
            _unselected_gradient_(block, unselected, slope, rows)
        # Adds to 0, and ids of other tiles add 0: exact in any order.
        block.scatter_add_(1, columns, torch.where(inside, selected_dz[rows], 0))
        if dz is not z:
            dz[rows] = block


def _columns(ids: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """(whether the id lies in the tile, its column there or any column if not), each [n, K]."""
    width = tile.z.shape[1]
    columns = ids - tile.first
    inside = (columns >= 0) & (columns < width)
    return inside, columns.clamp(0, width - 1)


def _remove_(block: Tensor, inside: Tensor, columns: Tensor) -> None:
    """-inf over the selected logits: a minimum, so that ids of other tiles change nothing."""
    lowest = torch.where(inside, -torch.inf, torch.inf).to(block.dtype)
    block.scatter_reduce_(1, columns, lowest, "amin")


def _unselected_gradient_(
    block: Tensor, unselected: UnselectedGradient, softcap_slope: Tensor | None, rows: slice
) -> None:
    """Transformed logits -> pi (constant + linear * log pi), times the softcap's derivative."""
    log_pi = block.sub_(unselected.top[rows, None]).sub_(unselected.lse[rows, None])
    log_pi.clamp_(min=_LEAST)
    pi = log_pi.exp()
    constant = unselected.constant[rows, None]
    idle = constant == 0
    if unselected.linear is None:
        torch.mul(pi, constant, out=block)
    else:
        linear = unselected.linear[rows, None]
        idle = idle & (linear == 0)
        log_pi.mul_(linear).add_(constant).mul_(pi)
    if softcap_slope is not None:
        block.mul_(softcap_slope)
    # A row without a gradient gets 0, even if its logits are NaN.
    block.masked_fill_(idle, 0.0)
