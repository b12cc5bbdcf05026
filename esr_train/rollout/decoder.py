"""Decoders: one forward pass per token for a batch of responses.

`SharedPrefixDecoder` attends over prompts that are stored once. `PlainDecoder`, for models whose
attention cannot read those, uses the cache that transformers makes for them. Both have the same
methods.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from esr_train.rollout.cache import (
    PrefixCache,
    Shape,
    Unsupported,
    shared_prefix_decoding,
    why_unsupported,
)
from esr_train.rollout.waves import Moves

logger = logging.getLogger(__name__)
# Tokens per forward pass over prompts: enough to fill matrix products, and a bound on memory.
_PREFILL_TOKENS = 8192
# Of keys and values on CPU, where nothing is said: not a share of what is free, so that the batches
# of a rollout, and the rounding of its logits, do not depend on what else runs.
_CPU_BYTES = 4 << 30
# Relative L2 difference of hidden states that rounding explains; another attention exceeds it.
_AGREES = {torch.float32: 1e-3, torch.float64: 1e-3}
_AGREES_16_BIT = 0.1


class SharedPrefixDecoder:
    """Keys and values of a prompt are computed and stored once for all of its responses."""

    captures = True  # a step allocates nothing that it keeps
    admits = True  # prompts may enter while others are decoded

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        self.model: Any = model
        device = next(self.model.parameters()).device
        config: Any = model.config
        self.cache = PrefixCache(config.num_hidden_layers, shape, device)

    def reset(self) -> None:
        """Make the buffers those of a new decoder."""
        self.cache.clear()

    def enter(self, prompts: list[list[int]], places: list[int], rows: list[int]) -> Tensor:
        """Hidden states [P', D] at the ends of prompts that go to `places`; `rows` start anew."""
        cache, device = self.cache, self.cache.index.device
        cache.forget(places, rows)
        if not prompts:  # the rows continue prompts that are there
            return torch.empty(0, device=device)
        lengths = [len(prompt) for prompt in prompts]
        where = torch.tensor(places, device=device)
        cache.prompt_lengths[where] = torch.tensor(lengths, device=device)
        # Prompts of similar length share a forward pass, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        hidden: Tensor | None = None
        for start, stop in _chunks([lengths[at] for at in order]):
            part = order[start:stop]
            ids = torch.zeros(len(part), lengths[part[-1]], dtype=torch.int64)
            for row, at in enumerate(part):
                ids[row, : lengths[at]] = torch.tensor(prompts[at])
            chosen = torch.tensor(part, device=device)
            cache.prefilled = where[chosen]
            try:
                states = self.model(
                    input_ids=ids.to(device), past_key_values=cache, use_cache=True
                ).last_hidden_state
            finally:
                cache.prefilled = None
            if hidden is None:
                hidden = states.new_empty(len(prompts), states.shape[2])
            last = torch.tensor([lengths[at] - 1 for at in part], device=device)
            hidden[chosen] = states[torch.arange(len(part), device=device), last]
        assert hidden is not None
        if any(layer.prefix is None for layer in cache.stored):
            raise Unsupported("a layer stores no keys")
        return hidden

    def arrange(self, place_of_row: list[int], prompts: int) -> None:
        """Which prompt the rows in use belong to; see `PrefixCache.place`."""
        self.cache.place(place_of_row, prompts)

    def step(self, token: Tensor, step: Tensor) -> Tensor:
        """Hidden states [b, D] after the token [b] of each row, its token number `step`."""
        self.cache.seek(step)
        with shared_prefix_decoding(self.model, self.cache):
            states: Tensor = self.model(
                input_ids=token[:, None],
                position_ids=(self.cache.row_starts[: len(token)] + step)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        return states[:, 0]

    def move(self, moves: Moves, size: int) -> None:
        """Make the copies (from, to), after which the first `size` rows are in use."""
        self.cache.move(*moves)

    @property
    def kv_bytes(self) -> int:
        return self.cache.kv_bytes


class PlainDecoder:
    """For any model with a cache: prompts padded on the left, and copied for each response.

    All prompts enter at once, and rows are at the same token.
    """

    captures = False
    admits = False

    def __init__(self, model: nn.Module, shape: Shape) -> None:
        self.model: Any = model
        self.samples = shape.samples

    def reset(self) -> None:
        pass

    def enter(self, prompts: list[list[int]], places: list[int], rows: list[int]) -> Tensor:
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, self.mask = ids.to(device), mask.to(device)
        self.cache = DynamicCache(config=self.model.config)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        hidden = self._forward(ids, positions)
        if self.samples > 1:
            try:
                self.cache.batch_repeat_interleave(self.samples)
            except AttributeError as error:  # layers with a state instead of keys
                raise Unsupported(
                    f"samples_per_prompt: got {self.samples}, must be 1 for "
                    f"{type(self.model).__name__}, whose cache cannot be repeated"
                ) from error
        self.mask = self.mask.repeat_interleave(self.samples, dim=0)
        self.position = self.mask.sum(1)
        return hidden

    def arrange(self, place_of_row: list[int], prompts: int) -> None:
        pass

    def step(self, token: Tensor, step: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        hidden = self._forward(token[:, None], self.position[:, None])
        self.position = self.position + 1
        return hidden

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        states: Tensor = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return states[:, -1]

    def move(self, moves: Moves, size: int) -> None:
        order = list(range(size))
        for source, target in moves.rows:
            order[target] = source
        rows = torch.tensor(order, device=self.mask.device)
        self.cache.batch_select_indices(rows)
        self.mask, self.position = self.mask[rows], self.position[rows]

    @property
    def kv_bytes(self) -> int:
        layers: list[Any] = self.cache.layers
        stored = [t for layer in layers for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in stored if t is not None)


Decoder = SharedPrefixDecoder | PlainDecoder


def decoder_type(model: nn.Module) -> type[Decoder]:
    """The decoder to use for `model`: a model without its head, in eval mode.

    The model is run on a few tokens. Attention that uses more than queries, keys, a scale, a window
    and a soft-cap gives other hidden states over a shared prompt, whatever the class declares.
    """
    reason = why_unsupported(model) or _disagrees(model)
    if reason is None:
        return SharedPrefixDecoder
    logger.warning(
        "%s decodes without shared prompts, with a copy of the prompt for each response: %s",
        type(model).__name__,
        reason,
    )
    return PlainDecoder


@torch.no_grad()
def _disagrees(model: nn.Module) -> str | None:
    """Why decoding over shared prompts differs from the model's own forward pass, or None."""
    prompts, samples = [[0, 1, 2], [1]], 2
    own: Any = model
    device = next(model.parameters()).device
    tokens = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]], device=device)
    shape = Shape(prompts=2, width=3, rows=4, samples=samples, capacity=2)
    try:
        decoder = SharedPrefixDecoder(model, shape)
        decoder.enter(prompts, [0, 1], [0, 1, 2, 3])
        decoder.arrange([0, 1, 2, 3], 2)
        for step in range(2):
            found = decoder.step(tokens[:, step], torch.full_like(tokens[:, 0], step))
    except Unsupported as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model may fail in any way on a cache that is not its own
        return f"{type(error).__name__}: {error}"
    ids = torch.zeros(4, 5, dtype=torch.int64, device=device)
    for row in range(4):
        prompt = prompts[row // samples]
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
        ids[row, len(prompt) : len(prompt) + 2] = tokens[row]
    states = own(input_ids=ids, use_cache=False).last_hidden_state
    expected = torch.stack([states[row, len(prompts[row // samples]) + 1] for row in range(4)])
    difference = float((found.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= _AGREES.get(expected.dtype, _AGREES_16_BIT):
        return f"over a shared prompt its hidden states differ by {difference:.2g}"
    return None


def bytes_that_fit(device: torch.device, kept: int) -> int:
    """Bytes of keys and values that a rollout takes by default, `kept` of them allocated before."""
    if device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused + kept) // 2


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token in all layers, by the config of a decoder."""
    config = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size: int = 2 * config.num_hidden_layers * kv_heads * dim
    return size * next(model.parameters()).element_size()


def _chunks(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Split ascending lengths into parts of at most _PREFILL_TOKENS, padding included."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop - start + 1) * lengths[stop] > _PREFILL_TOKENS:
            yield start, stop
            start = stop
