"""`shared_prefix_attention` of fp32 on CPU by `attention_native.c`, where there is a compiler.

Rows and heads are computed apart, so a row's result depends on nothing but the row.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from esr_kernels.cpu.library import library, over_rows

_WIDEST = 256


class _Cache(ctypes.Structure):
    _fields_ = [
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("lengths", ctypes.c_void_p),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("prefix", _Cache),
        ("suffix", _Cache),
        ("rows", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("repeats", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int64),
    ]


def serves(query: Tensor) -> bool:
    """Whether the compiled attention takes these queries, and caches of their dtype."""
    on_cpu = query.device.type == "cpu" and query.dtype == torch.float32
    return on_cpu and 0 < query.shape[2] <= _WIDEST and library() is not None


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
    """Checked operands -> [B, Hq, D]."""
    batch, heads, dim = query.shape
    prompts, kv_heads = prefix[0].shape[:2]
    width = batch // prompts if group_rows is None else group_rows.shape[1]
    out = torch.empty(batch, heads, dim, dtype=torch.float32, device="cpu")
    # Copies, if any, live in this list as long as the calls that read them.
    kept: list[Tensor] = []

    def pointer(tensor: Tensor) -> int:
        kept.append(tensor.resolve_neg().contiguous())
        return kept[-1].data_ptr()

    def cache(key: Tensor, value: Tensor, lengths: Tensor) -> _Cache:
        both = [t.resolve_neg() for t in (key, value)]
        both = [t if t.stride(3) == 1 else t.contiguous() for t in both]
        kept.extend(both)
        strides = ((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in both)
        return _Cache(*(t.data_ptr() for t in both), *strides, pointer(lengths))

    what = _Attention(
        pointer(query),
        out.data_ptr(),
        heads * dim,
        cache(*prefix),
        cache(*suffix),
        None if group_rows is None else pointer(group_rows),
        width,
        kv_heads,
        heads // kv_heads,
        dim,
        scale,
        softcap or 0.0,
        window or 0,
    )
    row_elements = (prefix[0].shape[2] + suffix[0].shape[2]) * dim
    over_rows("attend", what, prompts * kv_heads * width, row_elements)
    return out
