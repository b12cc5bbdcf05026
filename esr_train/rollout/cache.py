"""Keys and values of prompts that several responses share.

`PrefixCache` implements transformers' cache interface, so models that use it and the attention
interface need no change. Prompts are prefilled by the model's own attention; the cache stores their
keys and values. While responses are decoded, `shared_prefix_decoding` switches the model's config
to an attention function that reads the cache: `esr_kernels.shared_prefix_attention`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from esr_kernels import RowGroups, shared_prefix_attention

ATTENTION = "esr_shared_prefix"
_WINDOWS = ("full_attention", "sliding_attention")


class Unsupported(RuntimeError):
    """Attention that cannot be computed over a shared prefix; the message says why."""


class Shape(NamedTuple):
    """Sizes of the buffers of a rollout."""

    prompts: int  # P, prompts stored at the same time
    width: int  # L, tokens of the longest
    rows: int  # B, responses decoded at the same time
    samples: int  # G, responses a prompt has at most
    capacity: int  # N - 1, tokens of a response that are read again


class PrefixCache(Cache):
    """Keys and values of up to P prompts of up to L tokens, and of B responses of up to N.

    Each layer holds keys and values of shapes [P, Hkv, L, D] and [B, Hkv, N, D]: P * L + B * N
    tokens, where a cache of whole sequences holds B * (L + N). Token i of a prompt is at index i:
    padding is on the right, where causal attention does not reach it. Any prompt may be in any
    place and any response in any row, each at a token of its own. A step reads the first `rows` of
    the rows, and every buffer keeps its address for as long as the cache lives.
    """

    def __init__(self, layers: int, shape: Shape, device: torch.device) -> None:
        def zeros(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self.shape = shape
        self.prompt_lengths = zeros(shape.prompts)  # 0 in free places
        self.row_starts = zeros(shape.rows)  # length of each row's prompt
        self.index = zeros(shape.rows)  # where the current token of each row goes
        self.lengths = zeros(shape.rows)  # tokens of each row, with the current one
        self.every_row = torch.arange(shape.rows, device=device)
        self.table = RowGroups(zeros(shape.prompts, shape.samples), zeros(shape.rows))
        # What the next step reads; `place` sets them.
        self.rows, self.prompts = shape.rows, shape.prompts
        self.groups: RowGroups | None = None
        # On the CPU, the index that all rows have in common.
        self.common_index: int | None = None
        self.prefilled: Tensor | None = None  # places that the current forward pass computes
        # The layer that was updated last; the model calls its attention next.
        self.pending: _PrefixLayer | None = None
        self.stored = [_PrefixLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.stored))

    @property
    def kv_bytes(self) -> int:
        """Bytes of all buffers of keys and values."""
        return sum(layer.kv_bytes for layer in self.stored)

    def clear(self) -> None:
        """Zero all keys and values, as they are in new buffers."""
        self.prompt_lengths.zero_()
        for layer in self.stored:
            for tensor in layer.buffers:
                tensor.zero_()

    def place(self, place_of_row: list[int], prompts: int) -> None:
        """Say which row belongs to which prompt: place * samples + number, for each row in use.

        `prompts` places are in use.
        """
        rows, samples = len(place_of_row), self.shape.samples
        row_at = torch.full((prompts * samples,), -1)
        where = torch.tensor(place_of_row, dtype=torch.int64)
        row_at[where] = torch.arange(rows)
        self.rows, self.prompts = rows, prompts
        self.table.rows[:prompts] = row_at.view(prompts, samples).to(self.index.device)
        self.table.place[:rows] = where.to(self.index.device)
        self.row_starts[:rows] = self.prompt_lengths[self.table.place[:rows] // samples]
        in_order = rows == prompts * samples and place_of_row == list(range(rows))
        # A captured step reads the table, whatever it holds; without it the CPU copies less.
        self.groups = (
            None
            if in_order and self.index.device.type == "cpu"
            else RowGroups(self.table.rows[:prompts], self.table.place[:rows])
        )

    def seek(self, step: Tensor) -> None:
        """The current token is number `step` [rows] of each row.

        Rows that have ended may be at a token that has no place; they write over their last one.
        """
        index, lengths = self.index[: self.rows], self.lengths[: self.rows]
        torch.clamp(step, max=self.shape.capacity - 1, out=index)
        torch.add(index, 1, out=lengths)
        if index.device.type == "cpu":
            low, high = (int(end) for end in index.aminmax())
            self.common_index = low if low == high else None

    def move(self, prompts: list[tuple[int, int]], rows: list[tuple[int, int]]) -> None:
        """Copy prompts and responses (from, to)."""
        copy_entries([self.prompt_lengths, *self._buffers("prefix")], prompts)
        copy_entries(self._buffers("suffix"), rows)

    def forget(self, places: list[int], rows: list[int]) -> None:
        """Zero what the places and rows hold: attention multiplies it by 0, and it may be NaN."""
        for name, chosen in (("prefix", places), ("suffix", rows)):
            where = torch.tensor(chosen, dtype=torch.int64, device=self.index.device)
            for tensor in self._buffers(name):
                tensor.index_fill_(0, where, 0)

    def _buffers(self, name: str) -> list[Tensor]:
        return [tensor for layer in self.stored for tensor in getattr(layer, name) or ()]


def copy_entries(tensors: Iterable[Tensor], moves: list[tuple[int, int]]) -> None:
    """tensor[to] = tensor[from] for each (from, to); none is both."""
    if not moves:
        return
    pairs = torch.tensor(moves)
    source = target = None
    for tensor in tensors:
        if source is None:
            source, target = pairs.to(tensor.device).unbind(1)
        tensor[target] = tensor[source]


class _PrefixLayer(CacheLayerMixin):
    """One layer of a `PrefixCache`, with the interface that models expect of it."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)  # no circle: buffers go as soon as the cache does
        self.prefix: tuple[Tensor, Tensor] | None = None  # keys, values [P, Hkv, L, D]
        self.suffix: tuple[Tensor, Tensor] | None = None  # [B, Hkv, N, D]

    @property
    def cache(self) -> PrefixCache:
        cache = self._cache()
        assert cache is not None
        return cache

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        return (*(self.prefix or ()), *(self.suffix or ()))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self.cache.shape

        # Zeros, not uninitialised memory: attention gives masked keys a weight of 0, and 0 * NaN is
        # NaN.
        def zeros(count: int, tokens: int) -> Any:
            return tuple(
                states.new_zeros(count, states.shape[1], tokens, states.shape[3])
                for states in (key_states, value_states)
            )

        self.prefix = zeros(shape.prompts, shape.width)
        self.suffix = zeros(shape.rows, shape.capacity)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        cache = self.cache
        if key_states.shape != value_states.shape:
            raise Unsupported("keys and values have different shapes")
        if cache.prefilled is not None:
            if self.prefix is None:
                self.lazy_initialization(key_states, value_states)
            assert self.prefix is not None
            for stored, states in zip(self.prefix, (key_states, value_states), strict=True):
                stored[cache.prefilled, :, : states.shape[2]] = states
            return key_states, value_states
        if self.suffix is None or key_states.shape[2] != 1:
            raise Unsupported("the model does not store one key a layer and token")
        rows = cache.rows
        for stored, states in zip(self.suffix, (key_states, value_states), strict=True):
            if cache.common_index is not None:  # a plain copy is faster
                stored[:rows, :, cache.common_index] = states[:, :, 0]
            else:
                stored[cache.every_row[:rows], :, cache.index[:rows]] = states[:, :, 0]
        cache.pending = self
        return self.suffix

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # prefilling only, where every prompt starts at 0

    def get_seq_length(self) -> int:
        return 0 if self.cache.prefilled is not None else self.cache.shape.width

    def get_max_length(self) -> int:
        return -1


class _Active(threading.local):
    """The cache whose responses this thread is decoding."""

    cache: PrefixCache | None = None


_active = _Active()


@contextmanager
def shared_prefix_decoding(model: Any, cache: PrefixCache) -> Iterator[None]:
    """Inside, forward passes of `model` (a decoder) attend through `cache`."""
    AttentionInterface.register(ATTENTION, _attend)  # here: an import should register nothing
    config = model.config
    own, before = config._attn_implementation, _active.cache
    config._attn_implementation, _active.cache = ATTENTION, cache
    try:
        yield
    finally:
        config._attn_implementation, _active.cache = own, before


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that models call: query [B, Hq, 1, D] -> [B, 1, Hq, D]."""
    layer = _active.cache.pending if _active.cache is not None else None
    if layer is None or layer.prefix is None or layer.suffix is None:
        raise Unsupported("attention that does not follow an update of the cache")
    cache = layer.cache
    cache.pending = None
    unknown = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None or dropout or unknown:
        raise Unsupported(f"attention with {', '.join(unknown) or 'a mask or dropout'}")
    (prefix_key, prefix_value), (suffix_key, suffix_value) = layer.prefix, layer.suffix
    out = shared_prefix_attention(
        query[:, :, 0],
        prefix_key[: cache.prompts],
        prefix_value[: cache.prompts],
        cache.prompt_lengths[: cache.prompts],
        suffix_key[: cache.rows],
        suffix_value[: cache.rows],
        cache.lengths[: cache.rows],
        groups=cache.groups,
        scale=scaling,
        softcap=softcap,
        window=_window(module, others),
    )
    return out[:, None], None


def _window(module: torch.nn.Module, others: dict[str, Any]) -> int | None:
    """A layer's sliding window: the argument it passes to attention, else its config's."""
    if "sliding_window" in others:
        window: int | None = others["sliding_window"]
        return window
    config: Any = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if window is not None:
            raise Unsupported("a sliding window that the model does not pass to its attention")
        return None
    return window if kinds[module.layer_idx] == "sliding_attention" else None  # type: ignore[index]


def why_unsupported(model: Any) -> str | None:
    """Why a decoder cannot read a shared prefix by its class and config, or None."""
    config = model.config
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not use transformers' attention interface"
    kinds = set(getattr(config, "layer_types", None) or _WINDOWS)
    if not kinds <= set(_WINDOWS):
        return f"it has layers of {', '.join(sorted(kinds - set(_WINDOWS)))}"
    return None
