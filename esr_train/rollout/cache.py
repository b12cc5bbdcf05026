"""Keys and values of prompts that several responses share.

`PrefixCache` implements transformers' cache interface, so models that use it and the attention
interface need no change. Prompts are prefilled by the model's own attention; the cache stores their
keys and values. While responses are decoded, `shared_prefix_decoding` switches the model's config
to an attention function that reads the cache: `esr_kernels.shared_prefix_attention`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from esr_kernels import RowGroups, group_rows, shared_prefix_attention

ATTENTION = "esr_shared_prefix"
_WINDOWS = ("full_attention", "sliding_attention")


class Unsupported(RuntimeError):
    """Attention that cannot be computed over a shared prefix; the message says why."""


class PrefixCache(Cache):
    """Keys and values of P prompts of up to L tokens, and of B responses of up to N.

    Each layer holds keys and values of shapes [P, Hkv, L, D] and [B, Hkv, N, D]: P * L + B * N
    tokens, where a cache of whole sequences holds B * (L + N). Token i of a prompt is at index i:
    padding is on the right, where causal attention does not reach it.
    """

    def __init__(self, layers: int, prompt_lengths: list[int], device: torch.device) -> None:
        self.prompts, self.width = len(prompt_lengths), max(prompt_lengths)
        self.prompt_lengths = torch.tensor(prompt_lengths, device=device)
        # Prompts that the current forward pass computes.
        self.prefilled = torch.arange(self.prompts, device=device)
        self.decoding = False
        self.groups: RowGroups | None = None
        self.prompt_of_row: list[int] = []
        self.index = torch.zeros(1, dtype=torch.int64, device=device)  # of the current token
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)  # [B], with the current one
        # The layer that was updated last; the model calls its attention next.
        self.pending: _PrefixLayer | None = None
        self.stored = [_PrefixLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self.stored))

    @property
    def kv_bytes(self) -> int:
        """Bytes of all buffers of keys and values."""
        return sum(layer.kv_bytes for layer in self.stored)

    def start_decoding(self, samples: int, capacity: int) -> None:
        """Make room for `capacity` tokens of `samples` responses to each prompt."""
        self.decoding = True
        self.prompt_of_row = [prompt for prompt in range(self.prompts) for _ in range(samples)]
        self.lengths = self.index.new_zeros(len(self.prompt_of_row))
        for layer in self.stored:
            layer.make_room(len(self.prompt_of_row), capacity)

    def next_token(self) -> None:
        """Advance to the next token of the responses."""
        self.index.copy_(self.lengths[:1])
        self.lengths += 1

    def select(self, rows: Tensor, used: int) -> None:
        """Keep the responses `rows` [B'], int64 on the CPU, and their prompts.

        Each response has `used` tokens.
        """
        prompt_of_row = [self.prompt_of_row[row] for row in rows.tolist()]
        kept = sorted(set(prompt_of_row))
        device = self.lengths.device
        on_device = rows.to(device, non_blocking=True)
        prompts = None
        if len(kept) < self.prompts:
            prompts = torch.tensor(kept, device=device)
            self.prompt_lengths = self.prompt_lengths[prompts]
            self.prompts = len(kept)
        self.prompt_of_row = [kept.index(prompt) for prompt in prompt_of_row]
        self.groups = group_rows(self.prompt_of_row, self.prompts, device)
        self.lengths = self.lengths[on_device]
        for layer in self.stored:
            layer.select(on_device, prompts, used)


class _PrefixLayer(CacheLayerMixin):
    """One layer of a `PrefixCache`, with the interface that models expect of it."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__()
        self.cache = cache
        self.prefix: tuple[Tensor, Tensor] | None = None  # keys, values [P, Hkv, L, D]
        self.suffix: tuple[Tensor, Tensor] | None = None  # [B, Hkv, N, D]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        cache = self.cache
        # Zeros, not uninitialised memory: attention gives masked keys a weight of 0, and 0 * NaN is
        # NaN.
        self.prefix = tuple(  # type: ignore[assignment]
            states.new_zeros(cache.prompts, states.shape[1], cache.width, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        cache = self.cache
        if key_states.shape != value_states.shape:
            raise Unsupported("keys and values have different shapes")
        if not cache.decoding:
            if self.prefix is None:
                self.lazy_initialization(key_states, value_states)
            assert self.prefix is not None
            for stored, states in zip(self.prefix, (key_states, value_states), strict=True):
                stored[cache.prefilled, :, : states.shape[2]] = states
            return key_states, value_states
        if self.suffix is None or key_states.shape[2] != 1:
            raise Unsupported("the model does not store one key a layer and token")
        for stored, states in zip(self.suffix, (key_states, value_states), strict=True):
            # On the CPU reading the index does not synchronise, and a plain copy is faster.
            if stored.device.type == "cpu":
                stored[:, :, int(cache.index)] = states[:, :, 0]
            else:
                stored.index_copy_(2, cache.index, states)
        cache.pending = self
        return self.suffix

    def make_room(self, rows: int, capacity: int) -> None:
        if self.prefix is None:
            raise Unsupported("a layer stores no keys")
        self.suffix = tuple(  # type: ignore[assignment]
            stored.new_zeros(rows, stored.shape[1], capacity, stored.shape[3])
            for stored in self.prefix
        )

    def select(self, rows: Tensor, prompts: Tensor | None, used: int) -> None:
        assert self.prefix is not None and self.suffix is not None
        kept = []
        for stored in self.suffix:
            kept.append(stored.new_zeros(len(rows), *stored.shape[1:]))
            kept[-1][:, :, :used] = stored[:, :, :used][rows]
        self.suffix = (kept[0], kept[1])
        if prompts is not None:
            self.prefix = (self.prefix[0][prompts], self.prefix[1][prompts])

    @property
    def kv_bytes(self) -> int:
        stored = [*(self.prefix or ()), *(self.suffix or ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # prefilling only, where every prompt starts at 0

    def get_seq_length(self) -> int:
        return self.cache.width if self.cache.decoding else 0

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
    out = shared_prefix_attention(
        query[:, :, 0],
        *layer.prefix,
        cache.prompt_lengths,
        *layer.suffix,
        cache.lengths,
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
