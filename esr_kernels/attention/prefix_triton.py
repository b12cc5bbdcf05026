"""`shared_prefix_attention` in Triton: the GPU path, two kernels.

prefix  One program per (prompt, key head, block of the prompt's queries, split of the keys): the
        queries of all rows of a prompt that read one key head are the rows of a matrix, so a block
        of keys is loaded once for BLOCK_M of them and multiplied on the matrix units. Writes the
        weighted sum of values, the maximum and the sum of exponentials of its split, fp32.
suffix  One program per (row, key head): merges the splits of the prefix in order, continues over
        the row's own keys and writes the output.

Bytes   The prefix's keys and values once for every block of its queries, the suffix's once;
        8 (D + 2) a query head and split for the partial results of the first kernel.
FLOPs   4 D for every query head and key it sees; a block of fewer than 16 queries costs 16.

Blocks of keys that lie beyond the lengths or before the window are not loaded. Splits depend on
shapes alone and merge in a fixed order, so repeated launches agree bit for bit. Row offsets are
64-bit.

Kernels take a `cache` tuple, (key_ptr, value_ptr, the key's strides of row or prompt, head and
position, the value's strides of the same), and `settings`, (scale, softcap, window), softcap and
window None for none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.attention.arguments import AttentionOptions, Cache
from esr_kernels.attention.groups import RowGroups
from esr_kernels.common.launch import ceil_div, launch
from esr_kernels.common.logits_triton import online_maximum, transform_logits

# (bytes of an operand, widest head) -> (queries, keys) of a prefix block. The accumulator takes
# queries * head / 128 registers of a thread, and keys and values a block each of shared memory.
# fp32 uses no matrix unit, and its operands are held in registers.
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
# 32 queries spill 40 bytes on sm_90 in this version of Triton, and in no other.
if triton.__version__.startswith("3.5."):
    PREFIX_BLOCKS[4, 64] = (16, 32)
# So does a suffix of 8 warps with the widest fp32 heads, 8 bytes, in this one.
_SUFFIX_WARPS = {(4, 256): 4} if triton.__version__.startswith("3.4.") else {}
# The fewest rows of a matrix product.
_LEAST = 16
# Enough programs to fill a large GPU twice.
_WANTED_PROGRAMS = 256
# Fewest keys of a split: with fewer, the partial sums cost more than the split saves.
_LEAST_KEYS = 128


@triton.jit
def _head_of(cache, index, kv_head):
    """(key_ptr, value_ptr, key_stride, value_stride) of a key head of one prompt or row."""
    (
        key_ptr,
        value_ptr,
        key_stride_x,
        key_stride_h,
        key_stride_l,
        value_stride_x,
        value_stride_h,
        value_stride_l,
    ) = cache
    key_ptr += index * key_stride_x + kv_head.to(tl.int64) * key_stride_h
    value_ptr += index * value_stride_x + kv_head.to(tl.int64) * value_stride_h
    return key_ptr, value_ptr, key_stride_l, value_stride_l


@triton.jit
def _fold_block(
    query,
    head,
    start,
    stop,
    first,
    state,
    settings,
    DIM: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold the keys from `start` to start + BLOCK_L - 1 that lie below `stop` into `state`.

    `state` is (sum of exp(score - maximum) * value, maximum, sum of exp(score - maximum)) of each
    query. With a window, a query does not see keys before its `first`.
    """
    key_ptr, value_ptr, key_stride, value_stride = head
    weighted, top, total = state
    scale, softcap, window = settings
    position = start + tl.arange(0, BLOCK_L)
    lane = tl.arange(0, BLOCK_D)
    inside = position < stop
    load = inside[:, None] & (lane < DIM)[None, :]
    offset = position.to(tl.int64)[:, None]
    key = tl.load(key_ptr + offset * key_stride + lane[None, :], mask=load, other=0.0)
    scores = tl.dot(query, key.T, input_precision="ieee")
    scores, _ = transform_logits(scores, None, None, (None, scale, softcap, 1.0))
    seen = inside[None, :]
    if window is not None:
        seen = seen & (position[None, :] >= first[:, None])
    scores = tl.where(seen, scores, -float("inf"))
    top, base, decay, _ = online_maximum(top, tl.max(scores, 1))
    p = tl.exp(scores - base[:, None])
    value = tl.load(value_ptr + offset * value_stride + lane[None, :], mask=load, other=0.0)
    weighted = tl.dot(p.to(value.dtype), value, weighted * decay[:, None], input_precision="ieee")
    return weighted, top, total * decay + tl.sum(p, 1)


@triton.jit
def prefix_attention_kernel(
    query_ptr,
    cache,
    prefix_lengths_ptr,
    suffix_lengths_ptr,
    rows_ptr,
    partial,
    batch,
    kv_heads,
    group,
    query_blocks,
    split_keys,
    settings,
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
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row, mask=exists, other=-1)
        exists = exists & (row >= 0)
    query_head = row * kv_heads * REPEATS + kv_head * REPEATS + m % REPEATS
    lane = tl.arange(0, BLOCK_D)
    whole = exists[:, None] & (lane < DIM)[None, :]
    query = tl.load(query_ptr + query_head[:, None] * DIM + lane[None, :], mask=whole, other=0.0)

    length = tl.load(prefix_lengths_ptr + prompt).to(tl.int32)
    start = split * split_keys
    stop = tl.minimum(start + split_keys, length)
    first = tl.zeros([BLOCK_M], tl.int32)
    window = settings[2]
    if window is not None:
        own = tl.load(suffix_lengths_ptr + row, mask=exists, other=0).to(tl.int32)
        first = tl.where(exists, length + own - window, stop)
        start = tl.maximum(start, tl.min(first, 0) // BLOCK_L * BLOCK_L)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    head = _head_of(cache, prompt, kv_head)
    for at in range(start, stop, BLOCK_L):
        state = (weighted, top, total)
        weighted, top, total = _fold_block(
            query, head, at, stop, first, state, settings, DIM, BLOCK_L, BLOCK_D
        )
    weighted_ptr, sums_ptr = partial
    out = split.to(tl.int64) * batch * kv_heads * REPEATS + query_head
    tl.store(weighted_ptr + out[:, None] * DIM + lane[None, :], weighted, mask=whole)
    tl.store(sums_ptr + out * 2, top, mask=exists)
    tl.store(sums_ptr + out * 2 + 1, total, mask=exists)


@triton.jit
def suffix_attention_kernel(
    query_ptr,
    cache,
    suffix_lengths_ptr,
    partial,
    out_ptr,
    batch,
    kv_heads,
    splits,
    settings,
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
    query_head = (row * kv_heads + kv_head) * REPEATS + repeat
    lane = tl.arange(0, BLOCK_D)
    whole = exists[:, None] & (lane < DIM)[None, :]
    query = tl.load(query_ptr + query_head[:, None] * DIM + lane[None, :], mask=whole, other=0.0)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted_ptr, sums_ptr = partial
    part = query_head
    for _split in range(0, splits):  # not _, which is assigned in the loop
        part_top = tl.load(sums_ptr + part * 2, mask=exists, other=-float("inf"))
        top, base, decay, _ = online_maximum(top, part_top)
        share = tl.exp(part_top - base)
        part_total = tl.load(sums_ptr + part * 2 + 1, mask=exists, other=0.0)
        total = total * decay + part_total * share
        numbers = tl.load(weighted_ptr + part[:, None] * DIM + lane[None, :], mask=whole, other=0.0)
        weighted = weighted * decay[:, None] + numbers * share[:, None]
        part += batch * kv_heads * REPEATS
    own = tl.load(suffix_lengths_ptr + row).to(tl.int32)
    start = 0
    first = tl.zeros([BLOCK_M], tl.int32)
    window = settings[2]
    if window is not None:
        first += own - window
        start = tl.maximum(start, (own - window) // BLOCK_L * BLOCK_L)
    head = _head_of(cache, row, kv_head)
    for at in range(start, own, BLOCK_L):
        state = (weighted, top, total)
        weighted, top, total = _fold_block(
            query, head, at, own, first, state, settings, DIM, BLOCK_L, BLOCK_D
        )
    out = weighted / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        out_ptr + query_head[:, None] * DIM + lane[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=whole,
    )


def attend(
    query: Tensor,
    prefix: Cache,
    suffix: Cache,
    groups: RowGroups | None,
    options: AttentionOptions,
) -> Tensor:
    """Checked operands -> [B, Hq, D]."""
    query = query.contiguous()
    suffix_lengths = suffix.lengths.contiguous()
    batch, heads, dim = query.shape
    prompts, kv_heads, capacity, _ = prefix.key.shape
    repeats = heads // kv_heads
    block_d = max(_LEAST, triton.next_power_of_2(dim))
    kind = (query.element_size(), max(64, block_d))
    block_m, block_l = PREFIX_BLOCKS[kind]
    group = batch // prompts if groups is None else groups.rows.shape[1]
    block_m = min(block_m, max(_LEAST, triton.next_power_of_2(group * repeats)))
    query_blocks = ceil_div(group * repeats, block_m)
    programs = prompts * kv_heads * query_blocks
    splits, split_keys = _split_keys(capacity, programs, block_l)
    weighted = torch.empty(splits, batch, heads, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(splits, batch, heads, 2, dtype=torch.float32, device=query.device)
    shared = {
        "partial": (weighted, sums),
        "batch": batch,
        "kv_heads": kv_heads,
        "settings": _kernel_settings(options),
        "REPEATS": repeats,
        "DIM": dim,
        "BLOCK_D": block_d,
        "num_warps": 8 if kind in ((4, 128), (4, 256)) else 4,
    }
    if splits:
        launch(prefix_attention_kernel, (programs, splits), query)(
            query,
            _kernel_cache(prefix),
            prefix.lengths.contiguous(),
            suffix_lengths,
            None if groups is None else groups.rows.contiguous(),
            group=group,
            query_blocks=query_blocks,
            split_keys=split_keys,
            BLOCK_M=block_m,
            BLOCK_L=block_l,
            **shared,
        )
    out = torch.empty_like(query)
    launch(suffix_attention_kernel, (batch, kv_heads), query)(
        query,
        _kernel_cache(suffix),
        suffix_lengths,
        out_ptr=out,
        splits=splits,
        BLOCK_M=max(_LEAST, triton.next_power_of_2(repeats)),
        BLOCK_L=SUFFIX_KEYS[kind],
        **{**shared, "num_warps": _SUFFIX_WARPS.get(kind, shared["num_warps"])},
    )
    return out


def _kernel_cache(cache: Cache) -> tuple[Tensor | int, ...]:
    """The `cache` tuple of a launch."""
    key, value = (
        states if states.stride(3) == 1 else states.contiguous()
        for states in (cache.key, cache.value)
    )
    return key, value, *key.stride()[:3], *value.stride()[:3]


def _kernel_settings(options: AttentionOptions) -> tuple[float, float | None, int | None]:
    """The `settings` tuple of a launch; Triton would pass an int as one."""
    softcap = None if options.softcap is None else float(options.softcap)
    return float(options.scale), softcap, options.window


def _split_keys(capacity: int, programs: int, block: int) -> tuple[int, int]:
    """(splits of the prefix, keys in each, whole blocks): enough programs to fill the GPU."""
    if capacity == 0:
        return 0, 0
    wanted = ceil_div(_WANTED_PROGRAMS, max(programs, 1))
    splits = max(1, min(wanted, capacity // _LEAST_KEYS))
    keys = ceil_div(ceil_div(capacity, splits), block) * block
    return ceil_div(capacity, keys), keys
