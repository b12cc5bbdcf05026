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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from esr_kernels import SampleKeys, SamplingParams, sample_from_hidden
from esr_kernels.common.arguments import check_size
from esr_train.data import seed_from
from esr_train.models import Head, check_head, decoder, eos_ids, head, max_positions
from esr_train.rollout.batch import RolloutBatch
from esr_train.rollout.decoder import CapturedStep, Decoder, decoder_type

# On CUDA the host reads which rows have ended once in so many steps. It reads a copy that was
# queued at the previous read, so it never waits for the step that it has just queued.
_POLL_EVERY = 8

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

    Raises:
        ModelError: the model's logits are not its head's weight times its decoder's hidden states,
            because of a LoRA on the head, a learned prompt or prefix, or a hook.
    """

    def __init__(self, model: Any, tokenizer: Any, classes: int | None = None) -> None:
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
        # Bytes of keys and values at the start of the last `generate`.
        self.kv_bytes = 0

    def check_fits(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise ContextError if a prompt is empty or exceeds the context together with its
        response, and ValueError if the model has no embedding for one of its tokens."""
        if not isinstance(prompts, (list, tuple)) or not all(
            isinstance(prompt, (list, tuple)) and all(type(token) is int for token in prompt)
            for prompt in prompts
        ):
            raise TypeError("prompts_token_ids must be a list with a list of ints for each prompt")
        if not prompts or min(map(len, prompts)) == 0:
            raise ContextError("prompts: at least one is needed, and none may be empty")
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
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RolloutBatch:
        """Sample up to `max_new_tokens` tokens for each prompt; temperature 0 is greedy.

        The same arguments and weights give the same tokens, bit for bit. A row's noise is a
        function of (seed_key, row key, position) alone: the other rows of a batch change a sample
        only through the rounding of its logits. NaN logits give tokens with a log-prob of NaN.

        Args:
            temperature, top_k, top_p, min_p: as in `esr_kernels.SamplingParams`; numbers, or
                tensors with a value for each response.
            row_keys: [B] int64, distinct; default 0 to B - 1. `batch.row_keys[[3]]` with the
                prompt of row 3 samples that row again.
            on_progress: called with (tokens a response so far, responses not known to have ended).

        Raises:
            ContextError: before any work, naming the longest prompt.
            ValueError, TypeError: naming the argument.
        """
        check_size("samples_per_prompt", samples_per_prompt, 1)
        check_size("max_new_tokens", max_new_tokens, 1)
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
        with _evaluating(self.model):
            decoding = self._decoder_type(decoder(self.model))
            # The last token is drawn but not fed to the model: it needs no room in the cache.
            hidden = decoding.prefill(prompts_token_ids, samples_per_prompt, max_new_tokens - 1)
            self.kv_bytes = decoding.kv_bytes
            sampling = _Sampling(
                decoding,
                head(self.model),
                self.classes,
                self.eos_ids,
                params,
                seed_from(*seed_key),
                row_keys.to(hidden.device),
                max_new_tokens,
            )
            sampling.run(hidden.repeat_interleave(samples_per_prompt, dim=0), on_progress)
        return sampling.result(
            [prompt for prompt in prompts_token_ids for _ in range(samples_per_prompt)],
            row_keys.cpu(),
        )


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


class _Sampling:
    """The loop over steps: draw a token, feed it, drop rows that have ended.

    A step reads and writes tensors that keep their addresses, so that it can be captured.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: Head,
        classes: int,
        eos: list[int],
        params: SamplingParams,
        seed: int,
        row_keys: Tensor,
        max_new_tokens: int,
    ) -> None:
        device, batch = row_keys.device, len(row_keys)
        self.decoder, self.head, self.classes = decoder, head, classes
        self.params, self.seed, self.max_new_tokens = params, seed, max_new_tokens
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # One entry per response. Rows may run past their EOS; `result` cuts what they added.
        shape, fp32 = (batch, max_new_tokens), torch.float32
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(shape, dtype=fp32, device=device)
        self.log_kept = torch.zeros(shape, dtype=fp32, device=device)
        # One entry per row that is still computed.
        self.rows = torch.arange(batch, device=device)  # the response that it belongs to
        self.keys = row_keys
        self.token = torch.zeros_like(self.rows)
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)

    def run(self, hidden: Tensor, on_progress: Callable[[int, int], None] | None) -> None:
        """Sample all tokens, from the hidden states [B, D] at the end of the prompts."""
        on_cuda = hidden.is_cuda
        watch = _Watch(on_cuda)
        step = CapturedStep(self._advance, on_cuda and self.decoder.captures)
        self._draw(hidden)
        # Work spent on ended rows since the last compaction, in steps of the whole batch.
        wasted = 0.0
        for done in range(1, self.max_new_tokens):
            alive = watch.look(self.alive)
            if alive is not None:
                count = int(alive.sum())
                if on_progress:
                    on_progress(done, count)
                if count == 0:
                    break
                gone = 1 - count / len(alive)
                wasted += gone
                if _should_compact(gone, wasted, self.max_new_tokens - done, on_cuda):
                    self._select(alive.nonzero()[:, 0], done - 1)
                    wasted = 0.0
                    watch, step = _Watch(on_cuda), CapturedStep(self._advance, step.capture)
            step()

    def _advance(self) -> None:
        hidden = self.decoder.step(self.token)
        self.step += 1
        self._draw(hidden)

    def _draw(self, hidden: Tensor) -> None:
        """The next token of each row."""
        sample = sample_from_hidden(
            hidden,
            self.head.weight,
            SampleKeys(self.seed, self.keys, self.step),
            self.params,
            bias=self.head.bias,
            softcap=self.head.softcap,
            logit_scale=self.head.scale,
            num_classes=self.classes,
        )
        self.token.copy_(sample.tokens)
        self.tokens[self.rows, self.step] = sample.tokens
        self.logprob[self.rows, self.step] = sample.logprob
        self.log_kept[self.rows, self.step] = sample.log_kept
        self.alive &= ~self._is_eos(sample.tokens)

    def _is_eos(self, tokens: Tensor) -> Tensor:
        return (tokens[..., None] == self.eos).any(-1)

    def _select(self, rows: Tensor, used: int) -> None:
        """Drop all rows but `rows`, int64 on the CPU; the cache holds `used` tokens of each."""
        self.decoder.select(rows, used)
        rows = rows.to(self.rows.device, non_blocking=True)
        self.rows, self.keys = self.rows[rows], self.keys[rows]
        self.token, self.alive = self.token[rows], self.alive[rows]
        self.params = SamplingParams(
            *(
                value[rows] if isinstance(value, Tensor) else value
                for value in (getattr(self.params, field.name) for field in fields(self.params))
            )
        )

    def result(self, prompts: list[list[int]], row_keys: Tensor) -> RolloutBatch:
        """The responses, each to its first EOS."""
        ends = self._is_eos(self.tokens)
        by_eos = ends.any(1)
        lengths = torch.where(by_eos, ends.int().argmax(1) + 1, self.max_new_tokens)
        inside = torch.arange(self.max_new_tokens, device=lengths.device) < lengths[:, None]
        return RolloutBatch(
            prompts=prompts,
            tokens=self.tokens.masked_fill(~inside, 0).cpu(),
            lengths=lengths.cpu(),
            finished_by_eos=by_eos.cpu(),
            logprob=self.logprob.masked_fill(~inside, 0.0).cpu(),
            log_kept=self.log_kept.masked_fill(~inside, 0.0).cpu(),
            row_keys=row_keys,
        )


class _Watch:
    """Reads which rows are alive; on CUDA with a delay, so that the host does not wait."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda, self.calls = on_cuda, 0
        self.seen: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def look(self, alive: Tensor) -> Tensor | None:
        """[B] bool on the CPU. On CUDA: the state of an earlier step, or None between polls."""
        if not self.on_cuda:
            return alive
        self.calls += 1
        if self.calls % _POLL_EVERY:
            return None
        before = self.seen
        if self.copied is not None:
            self.copied.synchronize()
        self.seen = torch.empty(alive.shape, dtype=torch.bool, pin_memory=True)
        self.seen.copy_(alive, non_blocking=True)
        self.copied = torch.cuda.Event()
        self.copied.record()
        return before


def _should_compact(gone: float, wasted: float, steps_left: int, on_cuda: bool) -> bool:
    """Whether to drop the ended rows, a share `gone` of all, by copying the others.

    On the CPU a copy of the caches costs about one step. It is made once ended rows have wasted
    half of that and would waste all of it in the steps that may be left. On CUDA a compaction needs
    a new graph, and the time of a step hardly depends on its number of rows.
    """
    if on_cuda:
        return gone >= 0.5 and steps_left >= 32
    return wasted >= 0.5 and gone * steps_left >= 1


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
