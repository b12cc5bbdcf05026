"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., SC 2011), and the variates that the
sampler computes from its words.

A number is a function of (seed, row id, step, tile) only: there is no state to save, or to
synchronise between devices. The seed is the key; the counter's words are the tile, the step
modulo 2**32 and the two halves of the row id. `philox_triton` computes the same words.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

_Words = TypeVar("_Words", Tensor, np.ndarray)

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class SampleKeys(NamedTuple):
    """The key of the noise of a draw.

    seed: an int from -2**63 to 2**64 - 1, or an int64 tensor [1] with its 64 bits. rows: [B] int64,
    an id for each row, which it keeps if the batch is reordered or compacted. step: number of
    tokens drawn before, modulo 2**32; an int, or an int64 tensor, 0-d or [B]. Tensors are on the
    device of `rows`. A CUDA graph reads them at every replay, and keeps ints as they were.
    """

    seed: int | Tensor
    rows: Tensor
    step: int | Tensor


def philox4x32(
    counter: tuple[_Words, _Words, _Words, _Words], key: tuple[Any, Any]
) -> tuple[_Words, _Words, _Words, _Words]:
    """Four words from 0 to 2**32 - 1 per counter; all int64, of shapes that broadcast.

    Takes tensors, or NumPy arrays: about a hundred small operations, a third of the time on CPU.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap around in int64, which leaves both halves of the unsigned product intact.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, ((p0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def key_words(seed: int | Tensor) -> tuple[Any, Any]:
    """The low and the high half of a seed: ints, or tensors where reading one would wait."""
    if isinstance(seed, Tensor) and seed.device.type == "cpu":
        seed = int(seed)
    return seed & _LOW, (seed >> 32) & _LOW


def step_tensor(keys: SampleKeys) -> Tensor:
    """The step as [1] or [B] int64 on the device of the rows."""
    if isinstance(keys.step, Tensor):
        return keys.step.reshape(-1)
    return torch.full((1,), keys.step & _LOW, dtype=torch.int64, device=keys.rows.device)


def keys_of(keys: SampleKeys, rows: slice) -> SampleKeys:
    """The keys of some of the rows."""
    step = step_tensor(keys)
    return SampleKeys(keys.seed, keys.rows[rows], step if step.numel() == 1 else step[rows])


def tile_words(keys: SampleKeys, tiles: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of every row and tile, each [B, tiles]."""
    row = keys.rows[:, None]
    tile = torch.arange(tiles, dtype=torch.int64, device=row.device)[None, :]
    step = step_tensor(keys)[:, None] & _LOW
    counter = (tile, step, row & _LOW, (row >> 32) & _LOW)
    key = key_words(keys.seed)
    if row.device.type != "cpu":
        return philox4x32(counter, key)
    c0, c1, c2, c3 = (word.numpy() for word in counter)
    w0, w1, w2, w3 = philox4x32((c0, c1, c2, c3), key)
    wrap = torch.from_numpy
    return wrap(w0), wrap(w1), wrap(w2), wrap(w3)


def gumbel(high: Tensor, low: Tensor) -> Tensor:
    """A standard Gumbel variate, fp32, from 64 random bits.

    -log of an exponential variate -log(1 - u), u = (high * 2**32 + low + 1/2) / 2**64. Near either
    end of (0, 1), the distance to that end is computed from the bits, not as 1 - u, so that both
    tails are accurate down to 2**-65: values lie between -3.81 and 45.06.
    """
    upper = high > 0x7FFFFFFF
    distance = _unit(torch.where(upper, _LOW - high, high), torch.where(upper, _LOW - low, low))
    exponential = torch.where(upper, -distance.log(), -torch.log1p(-distance))
    return -exponential.log()


def _unit(high: Tensor, low: Tensor) -> Tensor:
    """(high * 2**32 + low + 1/2) / 2**64 in fp32."""
    return high.float() * 2.0**-32 + (low.float() + 0.5) * 2.0**-64


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """A uniform variate of (0, 1), fp64: the middle of one of 2**52 equal intervals."""
    return (high.double() * 2.0**20 + (low >> 12).double() + 0.5) * 2.0**-52
