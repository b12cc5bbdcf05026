"""Decode attention of fp32 over shared prompts in C.

Each pair of row and head is computed on its own, so a row's result does not depend on other rows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from esr_kernels.cpu import structures
from esr_kernels.cpu.library import library
from esr_kernels.cpu.parallel_for import parallel_for

_MAX_HEAD_DIM = 256  # MAX_HEAD_DIM in attention.c


def supports_attention(query: Tensor) -> bool:
    """Whether `attend` takes this query [B, Hq, D], with keys and values of its dtype."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    return on_cpu and 0 < query.shape[2] <= _MAX_HEAD_DIM and library() is not None


def attend(
    query: Tensor,
    prefix: tuple[Tensor, Tensor, Tensor],
    suffix: tuple[Tensor, Tensor, Tensor],
    group_rows: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attention of each row's query over its prompt's keys and then its own -> [B, Hq, D].

    Args:
        query: [B, Hq, D].
        prefix, suffix: key [P or B, Hkv, L, D], value of that shape, lengths [P or B] int64.
        group_rows: [P, G] int64, the rows of each prompt and -1 in empty places. None: B = P * G,
            and the rows of prompt p are p * G to (p + 1) * G - 1.
    """
    batch, heads, dim = query.shape
    prompts, kv_heads = prefix[0].shape[:2]
    width = batch // prompts if group_rows is None else group_rows.shape[1]
    out = torch.empty(batch, heads, dim, dtype=torch.float32, device="cpu")
    kept: list[Tensor] = []  # copies that the C reads, alive until it returns

    def pointer(tensor: Tensor) -> int:
        kept.append(tensor.resolve_neg().contiguous())
        return kept[-1].data_ptr()

    def cache(key: Tensor, value: Tensor, lengths: Tensor) -> structures.Cache:
        both = [states.resolve_neg() for states in (key, value)]
        both = [states if states.stride(3) == 1 else states.contiguous() for states in both]
        kept.extend(both)
        strides = ((ctypes.c_int64 * 3)(*states.stride()[:3]) for states in both)
        return structures.Cache(*(s.data_ptr() for s in both), *strides, pointer(lengths))

    arguments = structures.Attention(
        query=pointer(query),
        out=out.data_ptr(),
        row_stride=heads * dim,
        prefix=cache(*prefix),
        suffix=cache(*suffix),
        rows=None if group_rows is None else pointer(group_rows),
        width=width,
        kv_heads=kv_heads,
        repeats=heads // kv_heads,
        dim=dim,
        scale=scale,
        softcap=softcap or 0.0,
        window=window or 0,
    )
    row_elements = (prefix[0].shape[2] + suffix[0].shape[2]) * dim
    parallel_for("attend", arguments, prompts * kv_heads * width, row_elements)
    return out
