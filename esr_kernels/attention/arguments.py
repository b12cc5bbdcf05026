"""The operands of decode attention, and the error for what it does not accept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


class Cache(NamedTuple):
    """Keys and values of the prompts (X = P, the prefix) or of the rows (X = B, the suffix)."""

    key: Tensor  # [X, Hkv, L, D]
    value: Tensor  # [X, Hkv, L, D]
    lengths: Tensor  # [X] int64: how many of the L exist


class AttentionOptions(NamedTuple):
    """What is computed from a query and its keys besides their products."""

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
    if not isinstance(query, Tensor) or query.dim() != 3:
        got = list(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise ValueError(f"query must be a tensor [B, Hq, D], one query a row, got {got}")
    if query.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"query must be one of {allowed}, got {query.dtype}")
    batch, heads, dim = query.shape
    if dim == 0:
        raise ValueError("query must have heads of at least one dimension, got [..., 0]")
    caches = {"prefix": prefix, "suffix": suffix}
    for part, cache in caches.items():
        for field, tensor in cache._asdict().items():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{part}_{field} must be a torch.Tensor, got {type(tensor).__name__}"
                )
    if prefix.key.dim() != 4 or prefix.key.shape[3] != dim:
        raise ValueError(
            f"prefix_key must have shape [P, Hkv, L, {dim}], got {list(prefix.key.shape)}"
        )
    kv_heads = prefix.key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"prefix_key must have a number of heads that divides the query's {heads}, "
            f"got {kv_heads}"
        )
    if suffix.key.dim() != 4 or suffix.key.shape != (batch, kv_heads, suffix.key.shape[2], dim):
        raise ValueError(
            f"suffix_key must have shape [{batch}, {kv_heads}, N, {dim}], "
            f"got {list(suffix.key.shape)}"
        )
    for part, cache in caches.items():
        if cache.value.shape != cache.key.shape:
            raise ValueError(
                f"{part}_value must have the shape of its keys, {list(cache.key.shape)}, "
                f"got {list(cache.value.shape)}"
            )
        for field in ("key", "value"):
            _check_like(f"{part}_{field}", getattr(cache, field), query)
        _check_lengths(f"{part}_lengths", cache, query)


def _check_like(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must be {query.dtype} as query is, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on {query.device} as query is, got {tensor.device}")


def _check_lengths(name: str, cache: Cache, query: Tensor) -> None:
    lengths, count, most = cache.lengths, cache.key.shape[0], cache.key.shape[2]
    if lengths.dtype != torch.int64 or lengths.shape != (count,):
        raise ValueError(
            f"{name} must be int64 of shape [{count}], got {lengths.dtype} {list(lengths.shape)}"
        )
    if lengths.device != query.device:
        raise ValueError(f"{name} must be on {query.device} as query is, got {lengths.device}")
    if lengths.device.type == "cpu" and count:
        low, high = (int(end) for end in lengths.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name} must be from 0 to {most}, got {low} to {high}")
