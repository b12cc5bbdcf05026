"""`shared_prefix_attention` in Triton: the GPU path, two kernels.

prefix  One program per (prompt, key head, block of the prompt's queries, split of the keys): the
        queries of all rows of a prompt that read one key head are the rows of a matrix, so a block
        of keys is loaded once for BLOCK_M of them and multiplied on the matrix units. Writes the
        weighted sum of values, the maximum and the sum of exponentials of its split, fp32.
suffix  One program per (row, key head): merges the splits of the prefix in order, goes on over the
        row's own keys and writes the output.

Bytes   The prefix's keys and values once for every block of its queries, the suffix's once;
        8 (D + 2) a query head and split for what passes between the kernels.
FLOPs   4 D for every query head and key it sees; a block of fewer than 16 queries costs 16.

Keys beyond the lengths, or before the window, are not loaded but for the rest of a block. Splits
depend on shapes alone and merge in a fixed order: a launch repeats bit for bit. Row offsets are
64-bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.common.logits_triton import tanh

if TYPE_CHECKING:
    from esr_kernels.attention.op import RowGroups

# (bytes of an operand, widest head) -> (queries, keys) of a prefix block. The accumulator takes
# queries * head / 128 registers of a thread, and keys and values a block each of shared memory.
# fp32 goes through no matrix unit, and its operands through registers.
PREFIX_BLOCKS: dict[tuple[int, int], tuple[int, int]] = {
    (2, 64): (64, 64),
    (2, 128): (64, 64),
    (2, 256): (32, 32),
    (4, 64): (32, 32),
    (4, 128): (16, 32),
    (4, 256): (16, 16),
}
SUFFIX_KEYS: dict[tuple[int, int], int] = {
    (2, 64): 64,
    (2, 128): 64,
    (2, 256): 32,
    (4, 64): 32,
    (4, 128): 32,
    (4, 256): 16,
}
# The fewest rows of a matrix product.
_LEAST = 16
# Programs that fill a large GPU about twice over.
_WANTED_PROGRAMS = 256
# Keys of a split, at least: fewer are not worth the partial sums.
_LEAST_KEYS = 128


@triton.jit
def _fold_block(
    query,
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    start,
    stop,
    first,
    weighted,
    top,
    total,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys start .. start + BLOCK_L - 1 below `stop`, folded into the three running numbers."""
    position = start + tl.arange(0, BLOCK_L)
    lane = tl.arange(0, BLOCK_D)
    inside = position < stop
    load = inside[:, None] & (lane < DIM)[None, :]
    offset = position.to(tl.int64)[:, None]
    key = tl.load(key_ptr + offset * key_stride + lane[None, :], mask=load, other=0.0)
    scores = tl.dot(query, key.T, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        scores = tanh(scores / softcap) * softcap
    seen = inside[None, :]
    if HAS_WINDOW:
        seen = seen & (position[None, :] >= first[:, None])
    scores = tl.where(seen, scores, -float("inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet must not turn into exp(-inf + inf).
    base = tl.where(new == -float("inf"), 0.0, new)
    decay = tl.exp(top - base)
    p = tl.exp(scores - base[:, None])
    value = tl.load(value_ptr + offset * value_stride + lane[None, :], mask=load, other=0.0)
    weighted = tl.dot(p.to(value.dtype), value, weighted * decay[:, None], input_precision="ieee")
    return weighted, new, total * decay + tl.sum(p, 1)


@triton.jit
def prefix_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    prefix_lengths_ptr,
    suffix_lengths_ptr,
    rows_ptr,
    weighted_ptr,
    sums_ptr,
    key_stride_p,
    key_stride_h,
    key_stride_l,
    value_stride_p,
    value_stride_h,
    value_stride_l,
    batch,
    kv_heads,
    group,
    query_blocks,
    split_keys,
    scale,
    softcap,
    window,
    HAS_GROUPS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    REPEATS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0) % query_blocks
    kv_head = tl.program_id(0) // query_blocks % kv_heads
    prompt = (tl.program_id(0) // query_blocks // kv_heads).to(tl.int64)
    split = tl.program_id(1)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = m // REPEATS
    exists = slot < group
    row = prompt * group + slot
    if HAS_GROUPS:
        row = tl.load(rows_ptr + row, mask=exists, other=-1)
        exists = exists & (row >= 0)
    head = row * kv_heads * REPEATS + kv_head * REPEATS + m % REPEATS
    lane = tl.arange(0, BLOCK_D)
    whole = exists[:, None] & (lane < DIM)[None, :]
    query = tl.load(query_ptr + head[:, None] * DIM + lane[None, :], mask=whole, other=0.0)

    length = tl.load(prefix_lengths_ptr + prompt).to(tl.int32)
    start = split * split_keys
    stop = tl.minimum(start + split_keys, length)
    first = tl.zeros([BLOCK_M], tl.int32)
    if HAS_WINDOW:
        own = tl.load(suffix_lengths_ptr + row, mask=exists, other=0).to(tl.int32)
        first = tl.where(exists, length + own - window, stop)
        start = tl.maximum(start, tl.min(first, 0) // BLOCK_L * BLOCK_L)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    key_ptr += prompt * key_stride_p + kv_head.to(tl.int64) * key_stride_h
    value_ptr += prompt * value_stride_p + kv_head.to(tl.int64) * value_stride_h
    for at in range(start, stop, BLOCK_L):
        weighted, top, total = _fold_block(
            query,
            key_ptr,
            value_ptr,
            key_stride_l,
            value_stride_l,
            at,
            stop,
            first,
            weighted,
            top,
            total,
            scale,
            softcap,
            HAS_SOFTCAP,
            HAS_WINDOW,
            DIM,
            BLOCK_L,
            BLOCK_D,
        )
    out = split.to(tl.int64) * batch * kv_heads * REPEATS + head
    tl.store(weighted_ptr + out[:, None] * DIM + lane[None, :], weighted, mask=whole)
    tl.store(sums_ptr + out * 2, top, mask=exists)
    tl.store(sums_ptr + out * 2 + 1, total, mask=exists)


@triton.jit
def suffix_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    suffix_lengths_ptr,
    weighted_ptr,
    sums_ptr,
    out_ptr,
    key_stride_b,
    key_stride_h,
    key_stride_l,
    value_stride_b,
    value_stride_h,
    value_stride_l,
    batch,
    kv_heads,
    splits,
    scale,
    softcap,
    window,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    REPEATS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    repeat = tl.arange(0, BLOCK_M)
    exists = repeat < REPEATS
    head = (row * kv_heads + kv_head) * REPEATS + repeat
    lane = tl.arange(0, BLOCK_D)
    whole = exists[:, None] & (lane < DIM)[None, :]
    query = tl.load(query_ptr + head[:, None] * DIM + lane[None, :], mask=whole, other=0.0)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    part = head
    for _ in range(0, splits):
        part_top = tl.load(sums_ptr + part * 2, mask=exists, other=-float("inf"))
        new = tl.maximum(top, part_top)
        base = tl.where(new == -float("inf"), 0.0, new)
        share, decay = tl.exp(part_top - base), tl.exp(top - base)
        part_total = tl.load(sums_ptr + part * 2 + 1, mask=exists, other=0.0)
        total = total * decay + part_total * share
        numbers = tl.load(weighted_ptr + part[:, None] * DIM + lane[None, :], mask=whole, other=0.0)
        weighted = weighted * decay[:, None] + numbers * share[:, None]
        top = new
        part += batch * kv_heads * REPEATS
    own = tl.load(suffix_lengths_ptr + row).to(tl.int32)
    start = 0
    first = tl.zeros([BLOCK_M], tl.int32)
    if HAS_WINDOW:
        first += own - window
        start = tl.maximum(start, (own - window) // BLOCK_L * BLOCK_L)
    key_ptr += row * key_stride_b + kv_head.to(tl.int64) * key_stride_h
    value_ptr += row * value_stride_b + kv_head.to(tl.int64) * value_stride_h
    for at in range(start, own, BLOCK_L):
        weighted, top, total = _fold_block(
            query,
            key_ptr,
            value_ptr,
            key_stride_l,
            value_stride_l,
            at,
            own,
            first,
            weighted,
            top,
            total,
            scale,
            softcap,
            HAS_SOFTCAP,
            HAS_WINDOW,
            DIM,
            BLOCK_L,
            BLOCK_D,
        )
    out = weighted / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out_ptr + head[:, None] * DIM + lane[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=whole,
    )


def attend(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_lengths: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    suffix_lengths: Tensor,
    groups: RowGroups | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Checked operands -> [B, Hq, D]."""
    query = query.contiguous()
    prefix_lengths, suffix_lengths = prefix_lengths.contiguous(), suffix_lengths.contiguous()
    batch, heads, dim = query.shape
    prompts, kv_heads, capacity, _ = prefix_key.shape
    repeats = heads // kv_heads
    block_d = max(_LEAST, triton.next_power_of_2(dim))
    kind = (query.element_size(), max(64, block_d))
    block_m, block_l = PREFIX_BLOCKS[kind]
    group = batch // prompts if groups is None else groups.rows.shape[1]
    block_m = min(block_m, max(_LEAST, triton.next_power_of_2(group * repeats)))
    query_blocks = triton.cdiv(group * repeats, block_m)
    programs = prompts * kv_heads * query_blocks
    splits, split_keys = _split_keys(capacity, programs, block_l)
    weighted = torch.empty(splits, batch, heads, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(splits, batch, heads, 2, dtype=torch.float32, device=query.device)
    shared = {
        "kv_heads": kv_heads,
        "batch": batch,
        "scale": float(scale),
        "softcap": float(softcap or 1.0),
        "window": window or 0,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_WINDOW": window is not None,
        "REPEATS": repeats,
        "DIM": dim,
        "BLOCK_D": block_d,
        "num_warps": 8 if kind in ((4, 128), (4, 256)) else 4,
    }
    if splits:
        key, value = _rows_of_one_stride(prefix_key), _rows_of_one_stride(prefix_value)
        prefix_attention_kernel[(programs, splits)](
            query,
            key,
            value,
            prefix_lengths,
            suffix_lengths,
            prefix_lengths if groups is None else groups.rows.contiguous(),
            weighted,
            sums,
            *key.stride()[:3],
            *value.stride()[:3],
            group=group,
            query_blocks=query_blocks,
            split_keys=split_keys,
            HAS_GROUPS=groups is not None,
            BLOCK_M=block_m,
            BLOCK_L=block_l,
            **shared,
        )
    out = torch.empty_like(query)
    key, value = _rows_of_one_stride(suffix_key), _rows_of_one_stride(suffix_value)
    suffix_attention_kernel[(batch, kv_heads)](
        query,
        key,
        value,
        suffix_lengths,
        weighted,
        sums,
        out,
        *key.stride()[:3],
        *value.stride()[:3],
        splits=splits,
        BLOCK_M=max(_LEAST, triton.next_power_of_2(repeats)),
        BLOCK_L=SUFFIX_KEYS[kind],
        **shared,
    )
    return out


def _split_keys(capacity: int, programs: int, block: int) -> tuple[int, int]:
    """(splits of the prefix, keys in each, whole blocks): so many that programs fill the GPU."""
    if capacity == 0:
        return 0, 0
    wanted = triton.cdiv(_WANTED_PROGRAMS, max(programs, 1))
    splits = max(1, min(wanted, capacity // _LEAST_KEYS))
    keys = triton.cdiv(triton.cdiv(capacity, splits), block) * block
    return triton.cdiv(capacity, keys), keys


def _rows_of_one_stride(cache: Tensor) -> Tensor:
    return cache if cache.stride(3) == 1 else cache.contiguous()
