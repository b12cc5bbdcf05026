"""Row passes of `picked` in PyTorch: the CPU path.

`z` [n, V] holds a tile's raw logits in fp32 or fp64 and is overwritten; rows go through in blocks
that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.common.tiles import row_blocks
from esr_kernels.common.transform import LogitTransform
from esr_kernels.scoring.selected import CENTRED, COLUMNS, LOG_SUM, MAX, RestGradient

# exp() of it is 0 in fp64, and unlike -inf it may be multiplied by 0.
_NOTHING = -1000.0


def _cap_(z: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """Raw logits -> tanh of the softcap, or transformed logits where there is none."""
    if bias is not None:
        z.add_(bias)
    if transform.softcap is not None:
        z.mul_(transform.scale / transform.softcap).tanh_()
    elif transform.slope != 1.0:
        z.mul_(transform.slope)


def _uncap_(z: Tensor, transform: LogitTransform) -> None:
    """What _cap_ leaves -> transformed logits."""
    if transform.softcap is not None:
        z.mul_(transform.softcap / transform.temperature)


def _within(ids: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(whether an id lies in the tile, its column there or some column if not), each [n, K]."""
    columns = ids - first
    inside = (columns >= 0) & (columns < width)
    return inside, columns.clamp(0, width - 1)


def _drop_(z: Tensor, inside: Tensor, columns: Tensor) -> None:
    """-inf over the picked logits. A minimum, so that ids of other tiles change nothing."""
    lowest = torch.where(inside, -torch.inf, torch.inf).to(z.dtype)
    z.scatter_reduce_(1, columns, lowest, "amin")


def tile_statistics(
    z: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ids: Tensor,
    first: int,
    picked: Tensor,
    chain: Tensor | None,
) -> Tensor:
    """Statistics [n, 1, COLUMNS] of the classes of a tile that `ids` [n, K] do not pick.

    Writes the transformed logits of those that they do to `picked` [n, K], and to `chain` [n, K],
    which there is with a softcap, its derivative 1 - tanh^2 there.
    """
    parts = torch.empty(z.shape[0], 1, COLUMNS, dtype=z.dtype, device=z.device)
    for rows in row_blocks(*z.shape):
        block = z[rows]
        inside, columns = _within(ids[rows], first, z.shape[1])
        _cap_(block, bias, transform)
        if chain is not None:
            capped = block.gather(1, columns)
            chain[rows] = torch.where(inside, 1 - capped.square(), chain[rows])
        _uncap_(block, transform)
        picked[rows] = torch.where(inside, block.gather(1, columns), picked[rows])
        _drop_(block, inside, columns)
        top = block.amax(1)
        empty = top == -torch.inf
        block.sub_(torch.where(empty, 0.0, top)[:, None]).clamp_(min=_NOTHING)
        pi = block.softmax(1)
        part = parts[rows, 0]
        part[:, MAX] = top
        part[:, LOG_SUM] = torch.where(empty, -torch.inf, -pi.amax(1).log())
        part[:, CENTRED] = torch.linalg.vecdot(pi, block)
    return parts


def tile_gradient_(
    z: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ids: Tensor,
    first: int,
    picked_dz: Tensor,
    rest: RestGradient | None,
    dz: Tensor,
) -> None:
    """Write the gradient of a tile's raw logits to `dz` [n, V], which may be `z`.

    With `rest` None the classes that were not picked get 0 and `z` is not read.
    """
    for rows in row_blocks(*z.shape):
        block = z[rows]
        inside, columns = _within(ids[rows], first, z.shape[1])
        if rest is None:
            block.zero_()
        else:
            _rest_rows_(block, bias, transform, inside, columns, rest, rows)
        # Onto zeros, and zeros for the ids of other tiles: exact in any order.
        block.scatter_add_(1, columns, torch.where(inside, picked_dz[rows], 0))
        if dz is not z:
            dz[rows] = block


def _rest_rows_(
    block: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    inside: Tensor,
    columns: Tensor,
    rest: RestGradient,
    rows: slice,
) -> None:
    """block <- pi (constant + linear * log pi), 0 for the picked classes."""
    _cap_(block, bias, transform)
    chain = None if transform.softcap is None else block.square().neg_().add_(1.0)
    _uncap_(block, transform)
    _drop_(block, inside, columns)
    log_pi = block.sub_(rest.top[rows, None]).sub_(rest.lse[rows, None]).clamp_(min=_NOTHING)
    pi = log_pi.exp()
    constant = rest.constant[rows, None]
    idle = constant == 0
    if rest.linear is None:
        torch.mul(pi, constant, out=block)
    else:
        linear = rest.linear[rows, None]
        idle = idle & (linear == 0)
        log_pi.mul_(linear).add_(constant).mul_(pi)
    if chain is not None:
        block.mul_(chain)
    # A row that asks for nothing gets nothing, even of a NaN.
    block.masked_fill_(idle, 0.0)
