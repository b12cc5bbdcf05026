"""Decode attention over a prompt that several rows share and the private suffix of each row: the
prompt's keys and values are stored, and read, once for all of its rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.attention import prefix_torch as prefix_attention_torch
from esr_kernels.common.arguments import check_size
from esr_kernels.common.head import check_impl
from esr_kernels.divergence import reference

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max
# What the kernels keep of a head in registers.
_WIDEST_TRITON_HEAD = 256


class RowGroups(NamedTuple):
    """Which rows belong to which prompt, for groups that are not all of one size: `group_rows`."""

    rows: Tensor  # [P, G] int64; -1 in the places that a smaller group leaves free
    place: Tensor  # [B] int64; where a row stands in `rows`, flattened


def group_rows(
    prompt_of_row: Sequence[int], prompts: int, device: torch.device | str = "cpu"
) -> RowGroups:
    """Groups of rows by prompt, G the size of the largest, in the order of the rows.

    Raises:
        ValueError: a row names a prompt that is not from 0 to `prompts` - 1.
    """
    check_size("prompts", prompts, 0)
    members: list[list[int]] = [[] for _ in range(prompts)]
    for row, prompt in enumerate(prompt_of_row):
        if not isinstance(prompt, int):
            raise TypeError(f"prompt_of_row must hold ints, got {prompt!r} for row {row}")
        if not 0 <= prompt < prompts:
            raise ValueError(
                f"prompt_of_row must be from 0 to {prompts - 1}, got {prompt} for row {row}"
            )
        members[prompt].append(row)
    width = max(map(len, members), default=0)
    rows = torch.full((prompts, width), -1, dtype=torch.int64)
    place = torch.empty(len(prompt_of_row), dtype=torch.int64)
    for prompt, group in enumerate(members):
        rows[prompt, : len(group)] = torch.tensor(group, dtype=torch.int64)
        place[group] = prompt * width + torch.arange(len(group))
    return RowGroups(rows.to(device), place.to(device))


@torch.no_grad()
def shared_prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_lengths: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_lengths: Tensor,
    *,
    groups: RowGroups | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one query a row over its prompt's keys and then its own.

    Row b of prompt p sees the keys k_0 .. k_{n-1}, which are the first prefix_lengths[p] of the
    prompt followed by the first suffix_lengths[b] of the row, its query being at position n - 1:

        out_b = sum_i softmax_i(f(scale * q_b . k_i)) v_i,   f(x) = softcap * tanh(x / softcap)

    Both parts are computed apart and merged by their log-sum-exp, which is exact: Hydragen (arXiv
    2402.05099). A row that sees no key gets 0.

    Args:
        query: [B, Hq, D]; heads h * Hq / Hkv to (h + 1) * Hq / Hkv - 1 read key head h.
        prefix_key, prefix_value: [P, Hkv, L, D], the dtype of `query`.
        prefix_lengths: [P] int64, on the device of `query`, from 0 to L.
        suffix_key, suffix_value: [B, Hkv, N, D]; N may be 0. Views of any strides are fine; best
            is 1 in the last dimension. What lies beyond the lengths or is hidden by a window must
            be finite in both caches: it may be multiplied by 0.
        suffix_lengths: [B] int64, from 0 to N, the query's own key counted.
        groups: which rows a prompt has, by `group_rows`. None: B = P * G, and rows p * G to
            (p + 1) * G - 1 belong to prompt p.
        scale: None is 1 / sqrt(D).
        softcap: None is no soft-capping (Gemma 2 has it).
        window: a query sees its own key and the window - 1 before it; None: all before it.
        impl: "auto" (Triton on GPU, "torch" on CPU and for D above 256), "torch" (fp32 on CPU:
            compiled C where there is a compiler), "triton", or "reference" (PyTorch, row by row).

    Returns:
        [B, Hq, D] in the dtype of `query`.

    Raises:
        ValueError or TypeError naming the argument, what it was and what is allowed. Lengths and
        groups are looked at on CPU only, where that does not stall.

    Exactness: scores, softmax and sums are fp32 (fp64 for fp64); products have the operands' dtype
        and accumulate in fp32. Repeated calls agree bit for bit.
    Memory: Triton keeps D + 2 floats a query head and split of the prefix, PyTorch the scores of
        both parts, C nothing. Keys and values are never repeated or concatenated: P * L + B * N of
        them stand for B * (L + N).
    Gradients: none; this is for sampling.
    Reference: `esr_kernels.divergence.reference.shared_prefix_attention`.

    Example:
        >>> groups = group_rows([0, 0, 1], prompts=2)  # one row of prompt 1 has finished
        >>> out = shared_prefix_attention(q, pk, pv, prompt_lengths, k, v, lengths, groups=groups)
    """
    batch, heads, dim = _check_tensors(
        query, prefix_key, prefix_value, prefix_lengths, suffix_key, suffix_value, suffix_lengths
    )
    check_impl(impl, "query", query)
    scale = dim**-0.5 if scale is None else scale
    if not abs(scale) <= _LARGEST:
        raise ValueError(f"scale must be None or finite in fp32, got {scale}")
    if softcap is not None and not 0 < softcap <= _LARGEST:
        raise ValueError(f"softcap must be None or finite in fp32 and above 0, got {softcap}")
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"window must be None or an integer of at least 1, got {window!r}")
    _check_groups(groups, batch, prefix_key.shape[0], query.device)
    if batch == 0:
        return torch.empty_like(query)
    tensors = (
        query,
        prefix_key,
        prefix_value,
        prefix_lengths,
        suffix_key,
        suffix_value,
        suffix_lengths,
        groups,
    )
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    if impl == "reference":
        dtype = torch.promote_types(query.dtype, torch.float32)
        out = reference.shared_prefix_attention(
            *tensors[:-1], groups=groups, **options, dtype=dtype
        )
        return out.to(query.dtype)
    if impl == "auto":
        impl = "triton" if query.is_cuda and _triton_can(query) else "torch"
    if impl == "triton":
        if dim > _WIDEST_TRITON_HEAD:
            raise ValueError(
                f"impl='triton' takes heads of at most {_WIDEST_TRITON_HEAD}, query has {dim}; "
                "use impl='auto' or 'torch'"
            )
        from esr_kernels.attention import prefix_triton as prefix_attention_triton

        return prefix_attention_triton.attend(*tensors, **options)
    if cpu.supports_attention(query):
        prefix = prefix_key, prefix_value, prefix_lengths
        suffix = suffix_key, suffix_value, suffix_lengths
        rows = None if groups is None else groups.rows
        return cpu.attend(query, prefix, suffix, rows, **options)
    return prefix_attention_torch.attend(*tensors, **options)


def _triton_can(query: Tensor) -> bool:
    return (
        query.dtype != torch.float64
        and query.shape[2] <= _WIDEST_TRITON_HEAD
        and importlib.util.find_spec("triton") is not None
    )


def _check_tensors(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_lengths: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_lengths: Tensor,
) -> tuple[int, int, int]:
    """Raise on the first tensor that does not fit `query`; returns its shape."""
    if not isinstance(query, Tensor) or query.dim() != 3:
        got = list(query.shape) if isinstance(query, Tensor) else type(query).__name__
        raise ValueError(f"query must be a tensor [B, Hq, D], one query a row, got {got}")
    if query.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"query must be one of {allowed}, got {query.dtype}")
    batch, heads, dim = query.shape
    if dim == 0:
        raise ValueError("query must have heads of at least one dimension, got [..., 0]")
    for name, value in (
        ("prefix_key", prefix_key),
        ("prefix_value", prefix_value),
        ("prefix_lengths", prefix_lengths),
        ("suffix_key", suffix_key),
        ("suffix_value", suffix_value),
        ("suffix_lengths", suffix_lengths),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if prefix_key.dim() != 4 or prefix_key.shape[3] != dim:
        raise ValueError(
            f"prefix_key must have shape [P, Hkv, L, {dim}], got {list(prefix_key.shape)}"
        )
    prompts, kv_heads = prefix_key.shape[:2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"prefix_key must have a number of heads that divides the query's {heads}, "
            f"got {kv_heads}"
        )
    if suffix_key.dim() != 4 or suffix_key.shape != (batch, kv_heads, suffix_key.shape[2], dim):
        raise ValueError(
            f"suffix_key must have shape [{batch}, {kv_heads}, N, {dim}], "
            f"got {list(suffix_key.shape)}"
        )
    for name, value, like in (
        ("prefix_value", prefix_value, prefix_key),
        ("suffix_value", suffix_value, suffix_key),
    ):
        if value.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of its keys, {list(like.shape)}, "
                f"got {list(value.shape)}"
            )
    for name, value in (
        ("prefix_key", prefix_key),
        ("prefix_value", prefix_value),
        ("suffix_key", suffix_key),
        ("suffix_value", suffix_value),
    ):
        if value.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} as query is, got {value.dtype}")
        if value.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as query is, got {value.device}")
    for name, lengths, count, most in (
        ("prefix_lengths", prefix_lengths, prompts, prefix_key.shape[2]),
        ("suffix_lengths", suffix_lengths, batch, suffix_key.shape[2]),
    ):
        if lengths.dtype != torch.int64 or lengths.shape != (count,):
            raise ValueError(
                f"{name} must be int64 of shape [{count}], "
                f"got {lengths.dtype} {list(lengths.shape)}"
            )
        if lengths.device != query.device:
            raise ValueError(f"{name} must be on {query.device} as query is, got {lengths.device}")
        if lengths.device.type == "cpu" and count:
            low, high = (int(end) for end in lengths.aminmax())
            if low < 0 or high > most:
                raise ValueError(f"{name} must be from 0 to {most}, got {low} to {high}")
    return batch, heads, dim


def _check_groups(groups: RowGroups | None, batch: int, prompts: int, device: torch.device) -> None:
    if groups is None:
        if batch and (prompts == 0 or batch % prompts):
            raise ValueError(
                f"query has {batch} rows for {prompts} prompts: without groups each prompt must "
                "have the same number of rows; see group_rows"
            )
        return
    if not isinstance(groups, RowGroups):
        raise TypeError(f"groups must be None or what group_rows returns, got {groups!r}")
    rows, place = groups
    if rows.dtype != torch.int64 or place.dtype != torch.int64:
        raise TypeError(f"groups must be int64, got {rows.dtype} and {place.dtype}")
    if rows.dim() != 2 or rows.shape[0] != prompts or place.shape != (batch,):
        raise ValueError(
            f"groups must have rows [{prompts}, G] and place [{batch}], "
            f"got {list(rows.shape)} and {list(place.shape)}"
        )
    if rows.device != device or place.device != device:
        raise ValueError(f"groups must be on {device} as query is, got {rows.device}")
    if device.type == "cpu" and batch:  # where looking stalls nothing
        inside = 0 <= int(place.min()) <= int(place.max()) < rows.numel()
        found = rows.flatten()[place] if inside else None
        if found is None or not torch.equal(found, torch.arange(batch)):
            raise ValueError("groups: place must say where each row stands in rows")
        if int((rows >= 0).sum()) != batch:
            raise ValueError("groups: rows must name each row once, and be -1 in other places")
