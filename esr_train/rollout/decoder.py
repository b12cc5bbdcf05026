"""Decoders: one forward pass per token for a batch of responses.

`SharedPrefixDecoder` attends over prompts that are stored once. `PlainDecoder`, for models whose
attention cannot read those, uses the cache that transformers makes for them. Both have the same
methods. On CUDA a step is captured once and replayed: `CapturedStep`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from esr_train.rollout.cache import (
    PrefixCache,
    Unsupported,
    shared_prefix_decoding,
    why_unsupported,
)

logger = logging.getLogger(__name__)
# Tokens per forward pass over prompts: enough to fill matrix products, and a bound on memory.
_PREFILL_TOKENS = 8192
# Relative L2 difference of hidden states that rounding explains; another attention exceeds it.
_AGREES = {torch.float32: 1e-3, torch.float64: 1e-3}
_AGREES_16_BIT = 0.1


class SharedPrefixDecoder:
    """Keys and values of a prompt are computed and stored once for all of its responses."""

    captures = True  # a step allocates nothing that it keeps

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def prefill(self, prompts: list[list[int]], samples: int, capacity: int) -> Tensor:
        """Hidden states [P, D] at the end of each prompt; room for `capacity` tokens a response."""
        device = next(self.model.parameters()).device
        lengths = [len(prompt) for prompt in prompts]
        layers = self.model.config.num_hidden_layers
        self.cache = PrefixCache(layers, lengths, device)
        # Prompts of similar length share a forward pass, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        hidden: Tensor | None = None
        for start, stop in _chunks([lengths[at] for at in order]):
            part = order[start:stop]
            ids = torch.zeros(len(part), lengths[part[-1]], dtype=torch.int64)
            for row, at in enumerate(part):
                ids[row, : lengths[at]] = torch.tensor(prompts[at])
            chosen = torch.tensor(part, device=device)
            self.cache.prefilled = chosen
            states = self.model(
                input_ids=ids.to(device), past_key_values=self.cache, use_cache=True
            ).last_hidden_state
            if hidden is None:
                hidden = states.new_empty(len(prompts), states.shape[2])
            last = self.cache.prompt_lengths[chosen] - 1
            hidden[chosen] = states[torch.arange(len(part), device=device), last]
        assert hidden is not None
        self.cache.start_decoding(samples, capacity)
        self.position = self.cache.prompt_lengths.repeat_interleave(samples)
        return hidden

    def step(self, token: Tensor) -> Tensor:
        """Hidden states [B, D] after one more token [B] of each response."""
        self.cache.next_token()
        with shared_prefix_decoding(self.model, self.cache):
            states: Tensor = self.model(
                input_ids=token[:, None],
                position_ids=self.position[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state
        self.position += 1
        return states[:, 0]

    def select(self, rows: Tensor, used: int) -> None:
        """Keep the responses `rows`, int64 on the CPU, of `used` tokens each."""
        self.cache.select(rows, used)
        self.position = self.position[rows.to(self.position.device)]

    @property
    def kv_bytes(self) -> int:
        return self.cache.kv_bytes


class PlainDecoder:
    """For any model with a cache: prompts padded on the left, and copied for each response."""

    captures = False

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def prefill(self, prompts: list[list[int]], samples: int, capacity: int) -> Tensor:
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
        if samples > 1:
            try:
                self.cache.batch_repeat_interleave(samples)
            except AttributeError as error:  # layers with a state instead of keys
                raise Unsupported(
                    f"samples_per_prompt: got {samples}, must be 1 for "
                    f"{type(self.model).__name__}, whose cache cannot be repeated"
                ) from error
        self.mask = self.mask.repeat_interleave(samples, dim=0)
        self.position = self.mask.sum(1)
        return hidden

    def step(self, token: Tensor) -> Tensor:
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

    def select(self, rows: Tensor, used: int) -> None:
        rows = rows.to(self.mask.device)
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
    decoder = SharedPrefixDecoder(model)
    try:
        decoder.prefill(prompts, samples, 2)
        decoder.step(tokens[:, 0])
        found = decoder.step(tokens[:, 1])
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


class CapturedStep:
    """Calls a function whose inputs and outputs are tensors that exist before the call.

    With `capture`, which needs CUDA, the third call captures the function as a graph, and all calls
    from then on replay it. The first two calls run the function directly, so that kernels are
    compiled and workspaces allocated outside of the capture.
    """

    def __init__(self, function: Callable[[], None], capture: bool) -> None:
        self.function, self.capture = function, capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self) -> None:
        if not self.capture:
            return self.function()
        self.calls += 1
        if self.calls <= 2:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.function()
            torch.cuda.current_stream().wait_stream(side)
            return None
        if self.graph is None:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph):
                    self.function()
            except RuntimeError as error:  # the model reads a tensor on the host, for example
                logger.warning("decoding without a CUDA graph: %s", error)
                torch.cuda.set_stream(stream)  # a failed capture leaves its own stream current
                self.capture = False
                return self.function()
            self.graph = graph
        self.graph.replay()
        return None


def _chunks(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """Split ascending lengths into parts of at most _PREFILL_TOKENS, padding included."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop - start + 1) * lengths[stop] > _PREFILL_TOKENS:
            yield start, stop
            start = stop
