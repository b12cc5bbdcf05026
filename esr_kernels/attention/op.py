"""Decode attention over a prompt that several rows share and the private suffix of each row.

The prompt's keys and values are stored, and read, once for all of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.attention import prefix_torch, reference
from esr_kernels.attention.arguments import Cache, check_tensors, checked_options
from esr_kernels.attention.groups import RowGroups, check_groups, group_rows
from esr_kernels.common import triton_installed
from esr_kernels.common.arguments import check_impl

__all__ = ["RowGroups", "group_rows", "shared_prefix_attention"]

# The kernels hold a whole head in registers.
_WIDEST_TRITON_HEAD = 256


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
    """Attention of one query per row over the keys of its prompt followed by its own keys.

    Row b of prompt p sees the keys k_0 .. k_{n-1}, which are the first prefix_lengths[p] of the
    prompt followed by the first suffix_lengths[b] of the row, its query being at position n - 1:

        out_b = sum_i softmax_i(f(scale * q_b . k_i)) v_i,   f(x) = softcap * tanh(x / softcap)

    Prefix and suffix are computed separately and merged by their log-sum-exp, which is exact:
    Hydragen (arXiv 2402.05099). A row that sees no key gets 0.

    Args:
        query: [B, Hq, D]; heads h * Hq / Hkv to (h + 1) * Hq / Hkv - 1 read key head h.
        prefix_key, prefix_value: [P, Hkv, L, D], the dtype of `query`.
        prefix_lengths: [P] int64, on the device of `query`, from 0 to L.
        suffix_key, suffix_value: [B, Hkv, N, D]; N may be 0. Any strides are allowed; the
            last one should be 1. Entries beyond the lengths or before a window must be finite in
            both caches: they may be multiplied by 0.
        suffix_lengths: [B] int64, from 0 to N, the query's own key included.
        groups: which rows each prompt has, from `group_rows`. None: B = P * G, and rows p * G to
            (p + 1) * G - 1 belong to prompt p.
        scale: None is 1 / sqrt(D).
        softcap: None is no soft-capping (Gemma 2 has it).
        window: a query sees its own key and the window - 1 before it; None: all before it.
        impl: "auto" (Triton on GPU, "torch" on CPU and for D above 256), "torch" (fp32 on CPU:
            compiled C where there is a compiler), "triton", or "reference" (PyTorch, row by row).

    Returns:
        [B, Hq, D] in the dtype of `query`.

    Raises:
        ValueError, TypeError: naming the argument, what it was and what is allowed. The values of
            lengths and groups are checked on CPU only, where that does not synchronise.

    Exactness: scores, softmax and sums are fp32 (fp64 for fp64); products have the operands' dtype
        and accumulate in fp32. Repeated calls agree bit for bit.
    Memory: Triton keeps D + 2 floats a query head and split of the prefix, PyTorch the scores of
        both parts, C nothing. Keys and values are never repeated or concatenated: there are
        P * L + B * N of them instead of B * (L + N).
    Gradients: none; this is for sampling.
    Reference: `esr_kernels.attention.reference.attend`.

    Example:
        >>> groups = group_rows([0, 0, 1], prompts=2)  # one row of prompt 1 has finished
        >>> out = shared_prefix_attention(q, pk, pv, prompt_lengths, k, v, lengths, groups=groups)
    """
    prefix = Cache(prefix_key, prefix_value, prefix_lengths)
    suffix = Cache(suffix_key, suffix_value, suffix_lengths)
    check_tensors(query, prefix, suffix)
    check_impl(impl, "query", query)
    options = checked_options(query.shape[2], scale, softcap, window)
    check_groups(groups, query, prefix_key.shape[0])
    if query.shape[0] == 0:
        return torch.empty_like(query)
    if impl == "reference":
        dtype = torch.promote_types(query.dtype, torch.float32)
        return reference.attend(query, prefix, suffix, groups, options, dtype).to(query.dtype)
    if impl == "auto":
        impl = "triton" if query.is_cuda and _triton_supports(query) else "torch"
    if impl == "triton":
        if query.shape[2] > _WIDEST_TRITON_HEAD:
            raise ValueError(
                f"impl='triton' takes heads of at most {_WIDEST_TRITON_HEAD}, "
                f"query has {query.shape[2]}; use impl='auto' or 'torch'"
            )
        from esr_kernels.attention import prefix_triton

        return prefix_triton.attend(query, prefix, suffix, groups, options)
    if cpu.supports_attention(query):
        rows = None if groups is None else groups.rows
        return cpu.attend(query, prefix, suffix, rows, **options._asdict())
    return prefix_torch.attend(query, prefix, suffix, groups, options)


def _triton_supports(query: Tensor) -> bool:
    return (
        query.dtype != torch.float64
        and query.shape[2] <= _WIDEST_TRITON_HEAD
        and triton_installed.TRITON
    )
