"""Draws from rows of logits in PyTorch: the CPU path of the sampler.

    words      Philox words of every (row, tile of 256 classes), from the keys alone
    tiles      maximum and log-sum of every tile; with filters once more over the kept classes
    tile       the tile with the largest log-sum-exp plus Gumbel noise
    class      in that tile, by inverting its cumulative sum at one uniform, in fp64

Rows go through in blocks that stay in the cache; a block's logits are the only copy, if any. No
operation mixes rows, so a row's draw does not depend on the block that it is in. Tiles go through C
where there is a compiler (`cpu.tile_logsumexp`). Elsewhere softmax() stands in for exp(): its
vectorized exponential is faster, and it treats every tile alike wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.common import matmul
from esr_kernels.common.workspace import borrow
from esr_kernels.sampling.params import TILE, Classes, RowLaw, Sample
from esr_kernels.sampling.philox import SampleKeys, gumbel, keys_of, tile_words, uniform

_BLOCK_ELEMENTS = 640_000
# Words of one block of noise: 512 KiB an int64 operand.
_NOISE_ELEMENTS = 1 << 16
# How many of a row's largest logits are looked at for a filter without top-k, before all are.
_WIDTH = 4096


def sample_rows(raw: Tensor, classes: Classes, law: RowLaw, keys: SampleKeys) -> Sample:
    """Draw from raw logits [B, >= count] of any floating dtype, which are only read."""
    device, dtype = raw.device, matmul.logits_dtype(raw.dtype)
    tiles = -(-classes.count // TILE)
    sample = Sample(
        torch.empty(raw.shape[0], dtype=torch.int64, device=device),
        *(torch.empty(raw.shape[0], dtype=torch.float32, device=device) for _ in range(3)),
    )
    as_they_are = _is_loaded(raw, dtype, classes, law)
    for outer in _blocks(raw.shape[0], tiles, _NOISE_ELEMENTS):
        noise, level = None, None
        if not law.all_greedy:
            high, low, third, fourth = tile_words(keys_of(keys, outer), tiles)
            noise, level = gumbel(high, low), uniform(third, fourth)
        # What nothing is written to, compiled code reads once: there is no block to keep at hand.
        once = as_they_are and cpu.supports_tiles(raw)
        elements = raw.numel() if once else _BLOCK_ELEMENTS
        for inner in _blocks(outer.stop - outer.start, tiles * TILE, elements):
            rows = slice(outer.start + inner.start, outer.start + inner.stop)
            if as_they_are:
                z = raw[rows]
            else:
                z = borrow(
                    "sampled logits", (rows.stop - rows.start, tiles * TILE), raw.device, dtype
                )
                _load_(z, raw[rows], classes, law.rows(rows))
            drawn = _draw_(
                z,
                law.rows(rows),
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


def _is_loaded(raw: Tensor, dtype: torch.dtype, classes: Classes, law: RowLaw) -> bool:
    """Whether `_load_` would copy what is there already, and filters would not overwrite it."""
    plain = classes.bias is None and classes.invalid is None and not law.filtered
    unscaled = classes.transform.softcap is None and classes.transform.scale == 1.0
    whole = raw.shape[1] == classes.count and classes.count % TILE == 0
    same = raw.dtype == dtype and raw.is_contiguous()
    return plain and unscaled and law.inv_temperature is None and whole and same


def _load_(z: Tensor, raw: Tensor, classes: Classes, law: RowLaw) -> None:
    """z <- transformed logits, -inf for what is no valid class."""
    count = classes.count
    z[:, count:] = -torch.inf
    live = z[:, :count]
    live.copy_(raw[:, :count])
    if classes.bias is not None:
        live.add_(classes.bias)
    softcap, scale = classes.transform.softcap, classes.transform.scale
    if softcap is not None:
        live.mul_(scale / softcap).tanh_().mul_(softcap)
    elif scale != 1.0:
        live.mul_(scale)
    if law.inv_temperature is not None:
        live.mul_(law.inv_temperature[:, None])
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
    """`tile_sums` of the classes at or above the threshold: most tiles have none."""
    floor = threshold[:, None].expand_as(maxima)
    if z.device.type == "cpu":  # where counting stalls nothing
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
    """(top [b, 1], log-sum-exp less top [b], fp64): a large top would take digits with it."""
    top = maxima.amax(1, keepdim=True)
    below = torch.where(maxima == top, 0.0, (maxima - top).double())
    return top, (below + log_sums).exp().sum(1).log()


def _draw_(
    z: Tensor, law: RowLaw, noise: Tensor | None, level: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities, log of the kept mass, log-sum-exps; filters overwrite `z`."""
    maxima, log_sums = tile_sums(z.unflatten(1, (-1, TILE)))
    top, lse_above = _log_sum_exp(maxima, log_sums)
    lse = (top[:, 0].double() + lse_above).to(torch.float32)
    # A row of NaN, of +inf or of nothing but -inf has no distribution to draw from.
    proper = lse.isfinite()
    log_kept, threshold = torch.zeros_like(lse), None
    if law.all_greedy:
        tokens = _first_of_largest(z, maxima, proper)
    else:
        assert noise is not None and level is not None
        choice = proper if law.greedy is None else proper & ~law.greedy
        largest = None
        if z.device.type != "cpu" or not bool(choice.all()):
            largest = _first_of_largest(z, maxima, proper)
        if law.filtered:
            # The largest logit of a row stays, so that greedy rows lose nothing that they need.
            threshold = _cut_(z, top, lse_above, law)
            maxima, log_sums = _kept_tile_sums(z, maxima, threshold)
            _, kept_above = _log_sum_exp(maxima, log_sums)
            log_kept = torch.where(choice, (kept_above - lse_above).float(), log_kept)
        # A sum rather than a test for -inf: NaN rows choose something, too.
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
    # Below the whole sum however the product is rounded: some class passes it, and since a class
    # of no mass adds nothing to the sum, it has some.
    level = torch.minimum(level * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    # A row of NaN passes nothing.
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=TILE - 1)


def _cut_(z: Tensor, top: Tensor, lse_above: Tensor, law: RowLaw) -> Tensor:
    """The threshold [b] of what the filters keep; leaves -inf over the ties at it that they do not.

    Each filter keeps the first so many classes in the order (largest logit first, then lowest id),
    so together they keep the fewest: the classes above a threshold, and at it the first ids.
    """
    threshold, at_threshold = _threshold(z, top, lse_above, law)
    crowded = at_threshold < z.shape[1]
    if z.device.type == "cpu":  # where counting stalls nothing, and few rows are crowded
        rows = crowded.nonzero()[:, 0]
        if len(rows):
            some = z[rows]
            z[rows] = _without_late_ties(some, threshold[rows, None], at_threshold[rows, None])
    else:
        z.copy_(_without_late_ties(z, threshold[:, None], at_threshold[:, None]))
    return threshold


def _without_late_ties(z: Tensor, threshold: Tensor, keep: Tensor) -> Tensor:
    """-inf over all but the first `keep` classes of a row that are at its threshold."""
    ties = z == threshold
    return torch.where(ties & (ties.cumsum(1, dtype=torch.int32) > keep), -torch.inf, z)


def _threshold(z: Tensor, top: Tensor, lse_above: Tensor, law: RowLaw) -> tuple[Tensor, Tensor]:
    """(threshold [b], how many classes at it are kept [b]; the row's width means all of them)."""
    everything = z.shape[1]
    threshold = torch.full_like(top[:, 0], -torch.inf)
    at_threshold = torch.full_like(threshold, everything, dtype=torch.int64)
    if law.top_k is not None or law.top_p is not None:
        threshold, at_threshold = _ranked_threshold(z, top, lse_above, law)
    if law.min_p is not None:
        lowest = top[:, 0] + law.min_p.to(z.dtype).log()
        higher = lowest > threshold
        threshold = torch.where(higher, lowest, threshold)
        at_threshold = torch.where(higher, everything, at_threshold)
    return threshold, at_threshold


def _ranked_threshold(
    z: Tensor, top: Tensor, lse_above: Tensor, law: RowLaw
) -> tuple[Tensor, Tensor]:
    """What top-k and top-p keep, as `_threshold` says it.

    Looks at a row's largest logits only, as many as top-k asks for or else a guess; a row whose
    nucleus turns out to be larger is looked at again, further down, and in the end whole.
    """
    everything = z.shape[1]
    k = torch.full_like(lse_above, everything, dtype=torch.int64)
    if law.top_k is not None:
        k = torch.where(law.top_k > 0, law.top_k.clamp(max=everything), everything)
    p = torch.ones_like(lse_above) if law.top_p is None else law.top_p.double()
    if z.device.type != "cpu":  # what follows counts rows, and would stall a GPU
        threshold, at_threshold, _ = _prefix(z, top, lse_above, k, p, everything)
        return threshold, at_threshold
    threshold = torch.full_like(top[:, 0], -torch.inf)
    at_threshold = torch.full_like(k, everything)
    rows = ((k < everything) | (p < 1)).nonzero()[:, 0]
    for guess in (_WIDTH, everything):
        if len(rows) == 0:
            break
        ks = k[rows]
        most = int(torch.where(ks < everything, ks, 0).max())
        width = min(max(guess, most) if bool((ks == everything).any()) else most, everything)
        # Indexing copies: not where every row is meant, as it usually is at first.
        whole = len(rows) == len(z)
        found, count, complete = _prefix(
            z if whole else z[rows], top[rows], lse_above[rows], ks, p[rows], width
        )
        threshold[rows], at_threshold[rows] = found, count
        rows = rows[~complete]
    return threshold, at_threshold


def _largest(z: Tensor, count: int) -> Tensor:
    """The `count` largest logits of each row, descending."""
    if z.device.type != "cpu":
        return z.topk(count, dim=1).values
    # NumPy sorts and partitions values by vector instructions, 5 to 20 times as fast.
    copy = borrow("ranked logits", tuple(z.shape), z.device, z.dtype).copy_(z)
    values = copy.numpy()
    if count < z.shape[1]:
        values.partition(-count, axis=1)
    values[:, -count:].sort(axis=1)
    return copy[:, -count:].flip(1)


def _prefix(
    z: Tensor, top: Tensor, lse_above: Tensor, k: Tensor, p: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(threshold, kept at it, whether `width` logits were enough to know), each [b]."""
    everything = z.shape[1]
    # One more than needed, to see whether the next one ties with the last.
    values = _largest(z, min(width + 1, everything))
    mass = (values[:, :width] - top).double().exp().cumsum(1)
    among_k = mass.gather(1, k.clamp(max=width)[:, None] - 1)[:, 0]
    total = torch.where(k <= width, among_k, lse_above.exp())
    nucleus = (mass < (p * total)[:, None]).sum(1) + 1
    count = torch.where(p < 1, torch.minimum(nucleus, k), k)
    complete = (count <= width) | (width == everything)
    last = values.gather(1, count.clamp(max=width)[:, None] - 1)
    tied = values.gather(1, count.clamp(max=values.shape[1] - 1)[:, None]) == last
    tied &= (count < everything)[:, None]
    above = (values > last).sum(1)
    at_threshold = torch.where(tied[:, 0], count - above, everything)
    return last[:, 0], at_threshold, complete
