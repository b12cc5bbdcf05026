"""Draws from rows of logits in PyTorch: the CPU path of the sampler.

    words      Philox words of every (row, tile of 256 classes), from the keys alone
    tiles      maximum and log-sum of every tile; with filters once more over the kept classes
    tile       the tile with the largest log-sum-exp plus Gumbel noise
    class      in that tile, by inverting its cumulative sum at one uniform, in fp64

Rows are processed in blocks that stay in the cache; at most one block of logits is copied. No
operation mixes rows, so a row's draw does not depend on the block that it is in. Tiles are reduced
in C if there is a compiler (`cpu.tile_logsumexp`). Otherwise softmax() is used instead of exp(): it
is vectorized, and its result for a tile does not depend on the tile's position.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.common import matmul
from esr_kernels.common.transform import transform_
from esr_kernels.common.workspace import borrow
from esr_kernels.sampling.filters_torch import cut_
from esr_kernels.sampling.params import TILE, Classes, RowParams, Sample
from esr_kernels.sampling.philox import SampleKeys, gumbel, keys_of, tile_words, uniform

_BLOCK_ELEMENTS = 640_000
# Words of one block of noise: 512 KiB an int64 operand.
_NOISE_ELEMENTS = 1 << 16


def sample_rows(raw: Tensor, classes: Classes, params: RowParams, keys: SampleKeys) -> Sample:
    """Draw from raw logits [B, >= count] of any floating dtype, which are only read."""
    device, dtype = raw.device, matmul.logits_dtype(raw.dtype)
    tiles = -(-classes.count // TILE)
    sample = Sample(
        torch.empty(raw.shape[0], dtype=torch.int64, device=device),
        *(torch.empty(raw.shape[0], dtype=torch.float32, device=device) for _ in range(3)),
    )
    in_place = _usable_in_place(raw, dtype, classes, params)
    for outer in _blocks(raw.shape[0], tiles, _NOISE_ELEMENTS):
        noise, level = None, None
        if not params.all_greedy:
            high, low, third, fourth = tile_words(keys_of(keys, outer), tiles)
            noise, level = gumbel(high, low), uniform(third, fourth)
        # Compiled code reads logits once and nothing writes to them: blocks would save nothing.
        once = in_place and cpu.supports_tiles(raw)
        elements = raw.numel() if once else _BLOCK_ELEMENTS
        for inner in _blocks(outer.stop - outer.start, tiles * TILE, elements):
            rows = slice(outer.start + inner.start, outer.start + inner.stop)
            if in_place:
                z = raw[rows]
            else:
                z = borrow(
                    "sampled logits", (rows.stop - rows.start, tiles * TILE), raw.device, dtype
                )
                _load_(z, raw[rows], classes, params.of_rows(rows))
            drawn = _draw_(
                z,
                params.of_rows(rows),
                None if noise is None else noise[inner],
                None if level is None else level[inner],
            )
            for out, value in zip(sample, drawn, strict=True):
                out[rows] = value
    return sample


def _blocks(rows: int, width: int, elements: int) -> Iterator[slice]:
    height = max(1, elements // width)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _usable_in_place(raw: Tensor, dtype: torch.dtype, classes: Classes, params: RowParams) -> bool:
    """Whether the logits need no `_load_`, and no filter would write to them."""
    plain = classes.bias is None and classes.invalid is None and not params.filtered
    unscaled = classes.transform.softcap is None and classes.transform.scale == 1.0
    whole = raw.shape[1] == classes.count and classes.count % TILE == 0
    same = raw.dtype == dtype and raw.is_contiguous()
    return plain and unscaled and params.inv_temperature is None and whole and same


def _load_(z: Tensor, raw: Tensor, classes: Classes, params: RowParams) -> None:
    """z <- transformed logits, -inf at columns that are no valid class."""
    count = classes.count
    z[:, count:] = -torch.inf
    live = z[:, :count]
    live.copy_(raw[:, :count])
    transform_(live, classes.bias, classes.transform)
    if params.inv_temperature is not None:
        live.mul_(params.inv_temperature[:, None])
    if classes.invalid is not None:
        if classes.invalid.dtype == torch.bool:
            live.masked_fill_(classes.invalid, -torch.inf)
        else:
            live.index_fill_(1, classes.invalid, -torch.inf)


def tile_sums(tiled: Tensor) -> tuple[Tensor, Tensor]:
    """(maxima, log of the sums of exp(z - maximum)) of tiles [..., TILE]."""
    if cpu.supports_tiles(tiled):
        return cpu.tile_logsumexp(tiled)
    maxima = tiled.amax(-1)
    buffer = borrow("softmax in tiles", tiled.shape, tiled.device, tiled.dtype)
    inside = torch.softmax(tiled, -1, out=buffer)
    # The largest probability of a tile is 1 / its sum. A tile without a class has 0 / 0.
    return maxima, torch.where(maxima == -torch.inf, -torch.inf, -inside.amax(-1).log())


def _kept_tile_sums(z: Tensor, maxima: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_sums` of the classes at or above the threshold; on CPU it skips tiles without any."""
    floor = threshold[:, None].expand_as(maxima)
    if z.device.type == "cpu":  # elsewhere reading values would wait for the device
        alive = (maxima >= floor).flatten().nonzero()[:, 0]
    else:
        alive = torch.arange(maxima.numel(), device=z.device)
    some = z.view(-1, TILE).index_select(0, alive)
    some = _at_least(some, floor.flatten().index_select(0, alive))
    kept = torch.full((2, maxima.numel()), -torch.inf, dtype=z.dtype, device=z.device)
    for whole, part in zip(kept, tile_sums(some), strict=True):
        whole.index_copy_(0, alive, part)
    return kept[0].view_as(maxima), kept[1].view_as(maxima)


def _at_least(z: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(z < threshold[:, None], -torch.inf, z)


def _log_sum_exp(maxima: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """(top [b, 1], log-sum-exp - top [b], fp64): with a large top, their sum would lose digits."""
    top = maxima.amax(1, keepdim=True)
    below = torch.where(maxima == top, 0.0, (maxima - top).double())
    return top, (below + log_sums).exp().sum(1).log()


def _draw_(
    z: Tensor, params: RowParams, noise: Tensor | None, level: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, log of the kept mass, log-sum-exps; filters overwrite `z`."""
    maxima, log_sums = tile_sums(z.unflatten(1, (-1, TILE)))
    top, lse_above = _log_sum_exp(maxima, log_sums)
    lse = (top[:, 0].double() + lse_above).to(torch.float32)
    # A row of NaN, with +inf or of only -inf has no distribution.
    proper = lse.isfinite()
    log_kept, threshold = torch.zeros_like(lse), None
    if params.all_greedy:
        tokens = _first_of_largest(z, maxima, proper)
    else:
        assert noise is not None and level is not None
        choice = proper if params.greedy is None else proper & ~params.greedy
        largest = None
        if z.device.type != "cpu" or not bool(choice.all()):
            largest = _first_of_largest(z, maxima, proper)
        if params.filtered:
            # The largest logit of a row is kept, so greedy rows are not affected.
            threshold = cut_(z, top, lse_above, params)
            maxima, log_sums = _kept_tile_sums(z, maxima, threshold)
            _, kept_above = _log_sum_exp(maxima, log_sums)
            log_kept = torch.where(choice, (kept_above - lse_above).float(), log_kept)
        # Without a test for -inf, so that a row of NaN gets a tile too.
        tile = (maxima - top + log_sums + noise).argmax(1, keepdim=True)
        inside = _tile_of(z, tile)
        if threshold is not None:
            inside = _at_least(inside, threshold)
        tokens = tile[:, 0] * TILE + _invert(inside.softmax(1).double(), level.gather(1, tile))
        if largest is not None:
            tokens = torch.where(choice, tokens, largest)
    chosen = z.gather(1, tokens[:, None]) - top
    logprob = torch.where(proper, (chosen[:, 0].double() - lse_above).float(), torch.nan)
    log_kept = torch.where(proper, log_kept, torch.nan)
    return tokens, logprob, log_kept, lse


def _first_of_largest(z: Tensor, maxima: Tensor, proper: Tensor) -> Tensor:
    """First class of the largest logit that is a number; 0 where there is none."""
    tile = maxima.argmax(1, keepdim=True)
    first = tile[:, 0] * TILE + _tile_of(z, tile).argmax(1)
    if z.device.type == "cpu" and bool(proper.all()):
        return first
    return torch.where(proper, first, torch.where(z.isnan(), -torch.inf, z).argmax(1))


def _tile_of(values: Tensor, tile: Tensor) -> Tensor:
    """Tile `tile` [b, 1] of each row, [b, TILE]."""
    tiles = values.shape[1] // TILE
    first = torch.arange(0, values.shape[0] * tiles, tiles, device=values.device)
    return values.view(-1, TILE).index_select(0, first + tile[:, 0])


def _invert(p: Tensor, level: Tensor) -> Tensor:
    """The first class of each row at which the cumulative sum of `p` passes `level` [b, 1]."""
    cumulative = p.cumsum(1)
    whole = cumulative[:, -1:].contiguous()
    # Clamped below the whole sum, to which the product may round. Then some class passes the level,
    # and its mass is not 0, since a class of mass 0 leaves the sum as it is.
    level = torch.minimum(level * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    # In a row of NaN no class passes.
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=TILE - 1)
