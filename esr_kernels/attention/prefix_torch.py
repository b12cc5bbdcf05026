"""`shared_prefix_attention` in PyTorch: on CPU without a compiler, and for dtypes other than fp32.

The queries of a prompt's rows are the rows of one matrix, so that the prefix is a product
[G * rep, D] x [D, L] for each prompt and key head and is read once; the suffix is a batched product
[rep, D] x [D, N]. Each part returns its mean of values and its log-sum-exp, by which they merge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.attention.arguments import AttentionOptions, Cache
from esr_kernels.attention.groups import RowGroups


class _Part(NamedTuple):
    mean: Tensor  # [..., D]: softmax-weighted mean of values, 0 where no key is seen
    lse: Tensor  # [..., 1]: log-sum-exp of scores, the lowest finite number where no key is seen


def attend(
    query: Tensor,
    prefix: Cache,
    suffix: Cache,
    groups: RowGroups | None,
    options: AttentionOptions,
) -> Tensor:
    """Checked operands -> [B, Hq, D]."""
    batch, heads, dim = query.shape
    prompts, kv_heads = prefix.key.shape[:2]
    repeats = heads // kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaled = query.to(dtype) * options.scale
    by_row = scaled.view(batch, kv_heads, repeats, dim)

    if groups is None:
        width = batch // prompts
        rows = None
        grouped = by_row.view(prompts, width, kv_heads, repeats, dim)
    else:
        width = groups.rows.shape[1]
        rows = groups.rows.clamp(min=0)
        grouped = by_row[rows]
    by_prompt = grouped.transpose(1, 2).reshape(prompts, kv_heads, width * repeats, dim)
    first_of_prefix, first_of_suffix = None, None
    if options.window is not None:
        own = suffix.lengths.view(prompts, width) if rows is None else suffix.lengths[rows]
        # The first position that a row's query sees; those of the suffix follow the whole prefix.
        first_of_prefix = prefix.lengths[:, None] + own - options.window
        first_of_prefix = first_of_prefix.repeat_interleave(repeats, dim=1)[:, None, :, None]
        first_of_suffix = (suffix.lengths - options.window)[:, None, None, None]
    parts = []
    if prefix.key.shape[2]:
        part = _part(by_prompt, prefix, first_of_prefix, options.softcap)
        parts.append(_Part(*(_to_rows(field, width, groups) for field in part)))
    if suffix.key.shape[2]:
        parts.append(_part(by_row, suffix, first_of_suffix, options.softcap))
    if not parts:
        return torch.zeros_like(query)
    return _merged(parts).reshape(batch, heads, dim).to(query.dtype)


def _part(query: Tensor, cache: Cache, first: Tensor | None, softcap: float | None) -> _Part:
    """Attention of scaled queries [X, Hkv, M, D] over a cache, in the dtype of the queries.

    Keys before position `first`, which broadcasts to the scores, are not seen.
    """
    key, value, lengths = cache
    dtype = query.dtype
    shortest, longest = 0, key.shape[2]
    if lengths.device.type == "cpu":  # where reading values costs nothing
        shortest, longest = (int(end) for end in lengths.aminmax())
        key, value = key[:, :, :longest], value[:, :, :longest]
    scores = query @ key.to(dtype).transpose(2, 3)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if shortest < longest or first is not None:
        position = torch.arange(longest, device=key.device)
        hidden = (position >= lengths[:, None])[:, None, None, :]
        if first is not None:
            hidden = hidden | (position < first)
        scores.masked_fill_(hidden, -torch.inf)
    lowest = torch.finfo(dtype).min
    if longest == 0:
        return _Part(scores @ value.to(dtype), scores.new_full((*scores.shape[:3], 1), lowest))
    # Finite, so that a row of -inf gives exp(-inf) = 0 and not a NaN.
    top = scores.amax(dim=-1, keepdim=True).clamp_(min=lowest)
    weights = scores.sub_(top).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = total.log().add_(top).clamp_(min=lowest)
    return _Part((weights @ value.to(dtype)).div_(total.masked_fill_(total == 0, 1.0)), lse)


def _to_rows(field: Tensor, width: int, groups: RowGroups | None) -> Tensor:
    """[P, Hkv, G * rep, X] -> [B, Hkv, rep, X]."""
    prompts, kv_heads, _, last = field.shape
    split = field.view(prompts, kv_heads, width, -1, last).transpose(1, 2)
    flat = split.reshape(prompts * width, kv_heads, -1, last)
    return flat if groups is None else flat[groups.place]


def _merged(parts: list[_Part]) -> Tensor:
    """Means weighted by their share of the exponentials, of one part or both."""
    if len(parts) == 1:
        return parts[0].mean
    prefix, suffix = parts
    return torch.lerp(prefix.mean, suffix.mean, torch.sigmoid(suffix.lse - prefix.lse))
