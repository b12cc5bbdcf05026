"""Sampling responses from the student with the weights that are being trained.

One engine for short and full rollouts. Prompts are computed once and their keys and values shared
by their responses (`decode`, `prefix_cache`); then one token a time for all rows, drawn by
`esr_kernels.sample_from_hidden` with noise that belongs to the row. Padding is known by position,
never by id, so pad == eos is harmless. The generation config of the model is not applied: what is
sampled is softmax(logits / temperature), filtered where filters are asked for, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from esr_kernels import SampleKeys, SamplingParams, sample_from_hidden
from esr_kernels.common.arguments import check_size
from esr_train.data import seed_from
from esr_train.decode import CapturedStep, Decoder, decoder_for, evaluating
from esr_train.models import Head, check_head, decoder, eos_ids, head, max_positions

# Steps between looks at which rows have ended, on CUDA: each look is at the state of the one
# before, copied while the device went on, so the host never waits for a step it has just queued.
_POLL_EVERY = 8


class ContextError(ValueError):
    """Prompts that do not fit the model's context; the message names the longest."""


@dataclass(frozen=True)
class RolloutBatch:
    """B = prompts x samples responses, the samples of one prompt next to each other. On the CPU.

    The last three are there for what `PrefixRollout` sampled, and None where a batch was made by
    hand.
    """

    prompts: list[list[int]]  # token ids, one list per response
    tokens: Tensor  # [B, N] int64; 0 from `lengths` on
    lengths: Tensor  # [B] int64, EOS counted
    finished_by_eos: Tensor  # [B] bool; False: cut at N
    # [B, N] fp32, log softmax(logits / temperature)[token], of the whole distribution whatever the
    # filters; 0 from `lengths` on. Greedy rows: at temperature 1.
    logprob: Tensor | None = None
    # [B, N] fp32, log of the mass that the filters kept: logprob - log_kept is the log-probability
    # with which a token was drawn. 0 without filters.
    log_kept: Tensor | None = None
    # [B] int64: with the same prompt, seed_key and row key a response is sampled again alone.
    row_keys: Tensor | None = None

    def response(self, row: int) -> list[int]:
        """Token ids of one response, EOS included."""
        ids: list[int] = self.tokens[row, : int(self.lengths[row])].tolist()
        return ids

    def select(self, rows: Tensor) -> RolloutBatch:
        """The responses at `rows`: int64 indices, or a bool mask over all [B]."""
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows must be a torch.Tensor, got {type(rows).__name__}")
        batch = len(self.prompts)
        if rows.dtype == torch.bool and rows.shape == (batch,):
            rows = rows.nonzero()[:, 0]
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(
                f"rows must be int64 indices, or a bool mask of shape [{batch}], "
                f"got {rows.dtype} {list(rows.shape)}"
            )
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < batch:
            raise ValueError(
                f"rows must be from 0 to {batch - 1}, got {int(rows.min())} to {int(rows.max())}"
            )

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return RolloutBatch(
            prompts=[self.prompts[row] for row in rows.tolist()],
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            finished_by_eos=self.finished_by_eos[rows],
            logprob=cut(self.logprob),
            log_kept=cut(self.log_kept),
            row_keys=cut(self.row_keys),
        )


class PrefixRollout:
    """Generates with a causal language model.

    Args:
        tokenizer: only asked for `eos_token_id`; None if the model's config says it.
        classes: sample from the first so many tokens of the vocabulary. Student and teacher may be
            padded to different sizes, and neither can read a token that it has no embedding for.

    Raises:
        ModelError: the model's logits are not those of its head's weight on its decoder's hidden
            states: a LoRA on the head, a prompt or prefix that is learned, a hook.
    """

    def __init__(self, model: Any, tokenizer: Any, classes: int | None = None) -> None:
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(
                "model must be a transformers causal language model with an output head, "
                f"got {type(model).__name__}"
            )
        with evaluating(model):
            check_head(model)
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
        # Keys and values that the last `generate` began with: P * L + B * (N - 1) of them where the
        # model reads shared prompts.
        self.kv_bytes = 0

    def check_fits(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise ContextError where a prompt is empty, or with its response exceeds the context, and
        ValueError where a token is none that the model has an embedding for."""
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
        function of (seed_key, row key, position) alone: neighbours change a sample only by the
        rounding of its logits. A model whose logits are NaN gives tokens with a log-prob of NaN.

        Args:
            temperature, top_k, top_p, min_p: as in `esr_kernels.SamplingParams`; numbers, or
                tensors with a value for each response.
            row_keys: [B] int64, distinct; default 0 to B - 1. `batch.row_keys[[3]]` with the
                prompt of row 3 samples that row again.
            on_progress: called with (tokens a response so far, responses not known to have ended).

        Raises:
            ContextError: before any work, naming the longest prompt; ValueError or TypeError naming
            another argument.
        """
        check_size("samples_per_prompt", samples_per_prompt, 1)
        check_size("max_new_tokens", max_new_tokens, 1)
        if not isinstance(seed_key, tuple) or not all(
            type(part) in (int, str) for part in seed_key
        ):
            raise TypeError(f"seed_key must be a tuple of ints and strings, got {seed_key!r}")
        self.check_fits(prompts_token_ids, max_new_tokens)
        batch = len(prompts_token_ids) * samples_per_prompt
        if row_keys is None:
            row_keys = torch.arange(batch)
        if not isinstance(row_keys, Tensor):
            raise TypeError(f"row_keys must be a torch.Tensor, got {type(row_keys).__name__}")
        if row_keys.shape != (batch,) or row_keys.dtype != torch.int64:
            raise ValueError(
                f"row_keys must be int64 of shape [{batch}], one for each response, "
                f"got {row_keys.dtype} {list(row_keys.shape)}"
            )
        if len(row_keys.unique()) != batch:
            raise ValueError("row_keys must be distinct: rows that share one draw alike")
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
        with evaluating(self.model):
            engine = decoder_for(decoder(self.model))
            # The last token is drawn and never read: no room for it.
            hidden = engine.prefill(prompts_token_ids, samples_per_prompt, max_new_tokens - 1)
            self.kv_bytes = engine.kv_bytes
            sampling = _Sampling(
                engine,
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


class _Sampling:
    """The loop over steps: draw, feed, and leave out rows that have ended.

    A step is a function of tensors that stay where they are, so that it can be captured.
    """

    def __init__(
        self,
        engine: Decoder,
        head: Head,
        classes: int,
        eos: list[int],
        params: SamplingParams,
        seed: int,
        row_keys: Tensor,
        max_new_tokens: int,
    ) -> None:
        device, batch = row_keys.device, len(row_keys)
        self.engine, self.head, self.classes = engine, head, classes
        self.params, self.seed, self.max_new_tokens = params, seed, max_new_tokens
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        # By response; beyond the end of a response its row may go on for a while, see `result`.
        shape, fp32 = (batch, max_new_tokens), torch.float32
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(shape, dtype=fp32, device=device)
        self.log_kept = torch.zeros(shape, dtype=fp32, device=device)
        # By row that is computed.
        self.rows = torch.arange(batch, device=device)  # which response it is
        self.keys = row_keys
        self.token = torch.zeros_like(self.rows)
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)

    def run(self, hidden: Tensor, on_progress: Callable[[int, int], None] | None) -> None:
        """From the hidden states [B, D] at the end of the prompts."""
        on_cuda = hidden.is_cuda
        watch = _Watch(on_cuda)
        step = CapturedStep(self._advance, on_cuda and self.engine.captures)
        self._draw(hidden)
        wasted = 0.0  # steps' worth of rows computed after their end, since the last compaction
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
                if _pays(gone, wasted, self.max_new_tokens - done, on_cuda):
                    self._select(alive.nonzero()[:, 0], done - 1)
                    wasted = 0.0
                    watch, step = _Watch(on_cuda), CapturedStep(self._advance, step.capture)
            step()

    def _advance(self) -> None:
        hidden = self.engine.step(self.token)
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
        """Compute only `rows`, int64 on the CPU, from here on; `used` tokens of each are stored."""
        self.engine.select(rows, used)
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
    """Which rows are alive, as far as the host can know without waiting for the device."""

    def __init__(self, on_cuda: bool) -> None:
        self.on_cuda, self.calls = on_cuda, 0
        self.seen: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def look(self, alive: Tensor) -> Tensor | None:
        """[B] bool on the CPU; None between polls. Of an earlier step on CUDA."""
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


def _pays(gone: float, wasted: float, steps_left: int, on_cuda: bool) -> bool:
    """Whether to leave out the share of rows that is gone, at the price of copying the others.

    A copy of the caches is reckoned at one step. So wait until the rows that are gone have
    cost half of that, which bounds what is lost to bad luck, and are going to cost all of it. On
    CUDA there is another graph to capture, and the time of a step hardly depends on its rows.
    """
    if on_cuda:
        return gone >= 0.5 and steps_left >= 32
    return wasted >= 0.5 and gone * steps_left >= 1
