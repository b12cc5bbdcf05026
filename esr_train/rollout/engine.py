"""One engine for short and full rollouts.

A prompt's keys and values are computed once and shared by its responses (`decoder`, `cache`). Then
every step adds one token to all rows, drawn by `esr_kernels.sample_from_hidden` with noise that is
keyed by the row. Padding is known by position, never by id, so pad == eos needs no special case.
The model's generation config is not applied: tokens are drawn from softmax(logits / temperature),
cut by the filters that the caller gives.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esr_kernels import SamplingParams
from esr_kernels.common.arguments import check_size
from esr_train.data import seed_from
from esr_train.models import check_head, decoder, eos_ids, head, max_positions
from esr_train.rollout.batch import RolloutBatch, joined
from esr_train.rollout.cache import Shape
from esr_train.rollout.decoder import bytes_that_fit, decoder_type, token_bytes
from esr_train.rollout.graphs import CudaRecorder, Recorder, StepGraphs, weights_state
from esr_train.rollout.loop import Lanes, Requests, Sampling, in_parts
from esr_train.rollout.waves import Room, Rows, fixed_sizes, room

# Where steps are captured, buffers stay from rollout to rollout: those of so many shapes, none
# larger than this. A rollout that needs more runs many steps, beside which captures are cheap.
_KEPT_SHAPES = 2
_KEPT_BYTES = 2 << 30
# There, prompts' places are multiples of this, so that another longest prompt fits them.
_WIDTH_STEP = 64

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


class ContextError(ValueError):
    """Prompts that do not fit the model's context; the message names the longest."""


class PrefixRollout:
    """Generates with a causal language model.

    Making one runs the model on a few tokens, to check its head and to choose a decoder: make it
    once and call `generate` as often as needed. The weights may change in between.

    Args:
        tokenizer: read for `eos_token_id` only; None if the model's config has it.
        classes: sample from the first `classes` tokens of the vocabulary. Student and teacher may
            be padded to different sizes, and neither has an embedding for the other's extra tokens.
        stop_ids: token ids that end a response beside the model's own `eos_ids`: its teacher's.

    On CUDA the buffers and graphs of a rollout are kept for the next one of its shape; `release`,
    or the end of this object, frees them.

    Raises:
        ModelError: the model's logits are not its head's weight times its decoder's hidden states,
            because of a LoRA on the head, a learned prompt or prefix, or a hook.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        classes: int | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> None:
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(
                "model must be a transformers causal language model with an output head, "
                f"got {type(model).__name__}"
            )
        with _evaluating(model):
            check_head(model)
            self._decoder_type = decoder_type(decoder(model))
        self.model = model
        self.classes = rows = head(model).weight.shape[0]
        if classes is not None:
            check_size("classes", classes, 1)
            if classes > rows:
                raise ValueError(
                    f"classes must be at most {rows}, the rows of the head, got {classes}"
                )
            self.classes = classes
        self.eos_ids = eos_ids(model, tokenizer)
        extra = list(stop_ids or ())
        if not all(type(token) is int and token >= 0 for token in extra):
            raise ValueError(f"stop_ids must be token ids, ints of at least 0, got {extra}")
        self._extra_stop_ids = extra
        self._kept: OrderedDict[tuple[int, ...], Lanes] = OrderedDict()
        self._graphs: StepGraphs | None = None
        # Bytes of keys and values at the start of the last `generate`.
        self.kv_bytes = 0

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end a response."""
        return sorted({*self.eos_ids, *self._extra_stop_ids})

    def check_fits(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise ContextError if a prompt is empty or exceeds the context together with its
        response, and ValueError if the model has no embedding for one of its tokens."""
        if not isinstance(prompts, (list, tuple)) or not all(
            isinstance(prompt, (list, tuple)) and all(type(token) is int for token in prompt)
            for prompt in prompts
        ):
            raise TypeError("prompts_token_ids must be a list with a list of ints for each prompt")
        if not prompts:
            raise ContextError("prompts: at least one is needed, got none")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ContextError(f"prompts must have at least one token each, row {row} has none")
        longest, limit = max(prompts, key=len), max_positions(self.model)
        if limit is not None and len(longest) + max_new_tokens > limit:
            raise ContextError(
                f"context overflow: the longest prompt has {len(longest)} tokens (ids "
                f"{longest[:8]}...), and with {max_new_tokens} new ones exceeds the model's {limit}"
            )
        known = self.model.get_input_embeddings().weight.shape[0]
        for prompt in prompts:
            if not 0 <= min(prompt) <= max(prompt) < known:
                bad = min(prompt) if min(prompt) < 0 else max(prompt)
                raise ValueError(f"prompts: token ids must be from 0 to {known - 1}, got {bad}")

    @torch.no_grad()
    def generate(
        self,
        prompts_token_ids: list[list[int]],
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float | Tensor,
        seed_key: tuple[int | str, ...],
        *,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        row_keys: Tensor | None = None,
        max_tokens_in_flight: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RolloutBatch:
        """Sample up to `max_new_tokens` tokens for each prompt; temperature 0 is greedy.

        The same arguments and weights give the same tokens, bit for bit. A row's noise is a
        function of (seed_key, row key, position) alone: the other rows of a batch, and which of
        them are decoded at the same time, change a sample only through the rounding of its logits.
        NaN logits give tokens with a log-prob of NaN.

        Args:
            temperature, top_k, top_p, min_p: as in `esr_kernels.SamplingParams`; numbers, or
                tensors with a value for each response.
            row_keys: [B] int64, distinct; default 0 to B - 1. `batch.row_keys[[3]]` with the
                prompt of row 3 samples that row again.
            max_tokens_in_flight: how many tokens of prompts and responses have a place for keys and
                values at the same time, each prompt counted once and as long as the longest, each
                response as `max_new_tokens` - 1. Responses that find no room wait until others have
                ended. None: what half of a GPU's free memory holds, or on CPU 4 GiB.
            on_progress: called with (decoding steps so far + 1, responses not known to have ended).

        Raises:
            ContextError: before any work, naming the longest prompt.
            ValueError, TypeError: naming the argument.
        """
        check_size("samples_per_prompt", samples_per_prompt, 1)
        check_size("max_new_tokens", max_new_tokens, 1)
        if max_tokens_in_flight is not None:
            check_size("max_tokens_in_flight", max_tokens_in_flight, 1)
        if not isinstance(seed_key, tuple) or not all(
            type(part) in (int, str) for part in seed_key
        ):
            raise TypeError(f"seed_key must be a tuple of ints and strings, got {seed_key!r}")
        self.check_fits(prompts_token_ids, max_new_tokens)
        batch = len(prompts_token_ids) * samples_per_prompt
        row_keys = _checked_row_keys(row_keys, batch)
        device = next(self.model.parameters()).device

        def each(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.shape != (batch,):
                raise ValueError(
                    f"{name} must be a number or have shape [{batch}], one for each response, "
                    f"got {list(value.shape)}"
                )
            return value.to(device)

        params = SamplingParams(
            each("temperature", temperature),
            each("top_k", top_k),
            each("top_p", top_p),
            each("min_p", min_p),
        )
        requests = Requests(
            prompts_token_ids,
            samples_per_prompt,
            max_new_tokens,
            vars(params),
            row_keys.to(device),
            seed_from(*seed_key),
        )
        with _evaluating(self.model):
            return self._run(requests, max_tokens_in_flight, on_progress)

    def release(self) -> None:
        """Free the buffers and graphs that are kept for the next rollout; it makes new ones."""
        self._kept.clear()
        if self._graphs is not None:
            self._graphs.clear()
            self._graphs = None

    def _run(
        self,
        requests: Requests,
        budget: int | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> RolloutBatch:
        model = decoder(self.model)
        device = next(model.parameters()).device
        graphs = self._graphs_on(device)
        if budget is None:
            kept = sum(lanes.bytes for lanes in self._kept.values())
            budget = bytes_that_fit(device, kept) // token_bytes(model)
        stops = torch.tensor(self.stop_ids, dtype=torch.int64, device=device)
        if self._decoder_type.admits:
            parts = [requests]
        else:
            parts = in_parts(requests, budget)
        batches = []
        try:
            for part in parts:
                lanes = self._lanes(model, part, budget)
                space = Room(lanes.shape.prompts, lanes.shape.rows)
                sizes = None if graphs.recorder is None else fixed_sizes(space.rows)
                rows = Rows(part.responses, part.samples, space, sizes)
                sampling = Sampling(
                    lanes, rows, part, head(self.model), self.classes, stops, graphs
                )
                batches.append(sampling.run(on_progress))
                self.kv_bytes = sampling.kv_bytes
        finally:
            while self._kept and (
                len(self._kept) > _KEPT_SHAPES
                or graphs.recorder is None
                or next(reversed(self._kept.values())).bytes > _KEPT_BYTES
            ):
                self._drop(next(iter(self._kept)))
        return joined(batches)

    def _graphs_on(self, device: torch.device) -> StepGraphs:
        """The graphs of steps, without those of weights that are no longer the model's."""
        state = weights_state(self.model)
        if self._graphs is None or self._graphs.weights != state:
            self.release()
            self._graphs = StepGraphs(_recorder(device), state)
        return self._graphs

    def _lanes(self, model: nn.Module, requests: Requests, budget: int) -> Lanes:
        """Lanes for the requests: those of an earlier rollout of their shape, or new ones."""
        samples, length = requests.samples, requests.max_new_tokens
        width = max(map(len, requests.prompts))
        if self._graphs is not None and self._graphs.recorder is not None:
            width = -(-width // _WIDTH_STEP) * _WIDTH_STEP
        space = room(len(requests.prompts), samples, width, length - 1, budget)
        key = (*space, samples, length, requests.responses)
        lanes = self._kept.get(key)
        if lanes is not None and lanes.shape.width >= width:
            self._kept.move_to_end(key)
            lanes.reset()
            return lanes
        if lanes is not None:
            self._drop(key)
        # The last token is drawn but not fed to the model: it needs no room in the cache.
        shape = Shape(space.prompts, width, space.rows, samples, length - 1)
        lanes = Lanes(self._decoder_type, model, shape, requests.responses, length)
        self._kept[key] = lanes
        return lanes

    def _drop(self, key: tuple[int, ...]) -> None:
        lanes = self._kept.pop(key)
        if self._graphs is not None:
            self._graphs.forget(lambda graph: graph[0] == id(lanes))


def _recorder(device: torch.device) -> Recorder | None:
    return CudaRecorder(device) if device.type == "cuda" else None


def _checked_row_keys(row_keys: Tensor | None, batch: int) -> Tensor:
    if row_keys is None:
        return torch.arange(batch)
    if not isinstance(row_keys, Tensor):
        raise TypeError(f"row_keys must be a torch.Tensor, got {type(row_keys).__name__}")
    if row_keys.shape != (batch,) or row_keys.dtype != torch.int64:
        raise ValueError(
            f"row_keys must be int64 of shape [{batch}], one for each response, "
            f"got {row_keys.dtype} {list(row_keys.shape)}"
        )
    if len(row_keys.unique()) != batch:
        raise ValueError("row_keys must be distinct: rows with one key draw the same noise")
    return row_keys


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, without dropout and gradient checkpointing.

    Autocast is off, so that logits have the model's own dtype. Threads take turns on a model: its
    mode and its attention function are state that they share.
    """
    with _locks_lock:
        lock = _locks.setdefault(model, threading.RLock())
    device = next(model.parameters()).device.type
    with lock, torch.autocast(device, enabled=False):
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
