"""The specification of `shared_prefix_attention`: attention row by row over concatenated keys."""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.attention.arguments import AttentionOptions, Cache
from esr_kernels.attention.groups import RowGroups


def attend(
    query: Tensor,
    prefix: Cache,
    suffix: Cache,
    groups: RowGroups | None,
    options: AttentionOptions,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[B, Hq, D] in `dtype`, in which all arithmetic is done."""
    batch, heads, dim = query.shape
    prompts, kv_heads = prefix.key.shape[:2]
    out = torch.zeros(batch, heads, dim, dtype=dtype, device=query.device)
    for row in range(batch):
        if groups is None:
            prompt = row * prompts // batch
        else:
            prompt = int((groups.rows == row).any(1).nonzero())
        length, own = int(prefix.lengths[prompt]), int(suffix.lengths[row])
        first = 0 if options.window is None else max(0, length + own - options.window)
        if first == length + own:
            continue
        keys, values = (
            torch.cat([shared[prompt, :, :length], private[row, :, :own]], dim=1)[:, first:]
            .to(dtype)
            .repeat_interleave(heads // kv_heads, dim=0)
            for shared, private in ((prefix.key, suffix.key), (prefix.value, suffix.value))
        )
        scores = torch.einsum("hd,hnd->hn", query[row].to(dtype), keys) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        out[row] = torch.einsum("hn,hnd->hd", scores.softmax(-1), values)
    return out
