"""Operands of decode attention, and the checks of its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common.arguments import FLOATS, check_tensor

_LARGEST = torch.finfo(torch.float32).max


class Cache(NamedTuple):
    """Keys and values of the prompts (X = P, the prefix) or of the rows (X = B, the suffix)."""

    key: Tensor  # [X, Hkv, L, D]
    value: Tensor  # [X, Hkv, L, D]
    lengths: Tensor  # [X] int64: how many of the L exist


class AttentionOptions(NamedTuple):
    """Scale, soft-cap and window of the scores."""

    scale: float
    softcap: float | None
    window: int | None


def checked_options(
    dim: int, scale: float | None, softcap: float | None, window: int | None
) -> AttentionOptions:
    """The options of heads of `dim`; raises on the first that is not allowed."""
    scale = dim**-0.5 if scale is None else scale
    if not abs(scale) <= _LARGEST:
        raise ValueError(f"scale must be None or finite in fp32, got {scale}")
    if softcap is not None and not 0 < softcap <= _LARGEST:
        raise ValueError(f"softcap must be None or finite in fp32 and above 0, got {softcap}")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be None or an integer of at least 1, got {window!r}")
    return AttentionOptions(scale, softcap, window)


def check_tensors(query: Tensor, prefix: Cache, suffix: Cache) -> None:
    """Raise on the first tensor that does not fit `query`. Lengths are read on CPU only."""
    check_tensor("query", query, dtypes=FLOATS, shape=("B", "Hq", "D"))
    batch, heads, dim = query.shape
    if dim == 0:
        raise ValueError("query must have heads of at least one dimension, got [..., 0]")
    own = (query.dtype,)
    check_tensor("prefix_key", prefix.key, dtypes=own, shape=("P", "Hkv", "L", dim), like=query)
    kv_heads = prefix.key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"prefix_key must have a number of heads that divides the query's {heads}, "
            f"got {kv_heads}"
        )
    check_tensor(
        "suffix_key", suffix.key, dtypes=own, shape=(batch, kv_heads, "N", dim), like=query
    )
    for part, cache in (("prefix", prefix), ("suffix", suffix)):
        shape = tuple(cache.key.shape)
        check_tensor(f"{part}_value", cache.value, dtypes=own, shape=shape, like=query)
        _check_lengths(f"{part}_lengths", cache)


def _check_lengths(name: str, cache: Cache) -> None:
    count, most = cache.key.shape[0], cache.key.shape[2]
    check_tensor(name, cache.lengths, dtypes=(torch.int64,), shape=(count,), like=cache.key)
    if cache.lengths.device.type == "cpu" and count:
        low, high = (int(end) for end in cache.lengths.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name} must be from 0 to {most}, got {low} to {high}")
