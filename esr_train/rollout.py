"""Sampling responses from the student with the weights that are being trained.

One engine for short and full rollouts: left-padded prefill, then one token a time for all rows.
Prompts are computed once and their keys and values repeated for their samples. Padding is known by
position, never by id, so pad == eos is harmless. The generation config of the model is not applied:
what is sampled is softmax(logits / temperature) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from esr_train.data import seed_from
from esr_train.models import decoder, eos_ids, head, max_positions


class ContextError(ValueError):
    """Prompts that do not fit the model's context; the message names the longest."""


@dataclass(frozen=True)
class RolloutBatch:
    """B = prompts x samples responses, the samples of one prompt next to each other. On the CPU."""

    prompts: list[list[int]]  # token ids, one list per response
    tokens: Tensor  # [B, N] int64; 0 from `lengths` on
    lengths: Tensor  # [B] int64, EOS counted
    finished_by_eos: Tensor  # [B] bool; False: cut at N

    def response(self, row: int) -> list[int]:
        """Token ids of one response, EOS included."""
        ids: list[int] = self.tokens[row, : int(self.lengths[row])].tolist()
        return ids

    def select(self, rows: Tensor) -> RolloutBatch:
        """The responses at `rows`."""
        return RolloutBatch(
            prompts=[self.prompts[row] for row in rows.tolist()],
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            finished_by_eos=self.finished_by_eos[rows],
        )


class Rollout:
    """Generates with a causal language model.

    Args:
        tokenizer: only asked which tokens end a response.
        classes: sample from the first so many tokens of the vocabulary. Student and teacher may be
            padded to different sizes, and neither can read a token that it has no embedding for.
    """

    def __init__(self, model: Any, tokenizer: Any, classes: int | None = None) -> None:
        self.model = model
        self.classes = classes or head(model).weight.shape[0]
        self.eos_ids = eos_ids(model, tokenizer)

    def check_fits(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise ContextError where a prompt is empty, or with its response exceeds the context."""
        if not prompts or min(map(len, prompts)) == 0:
            raise ContextError("prompts: at least one is needed, and none may be empty")
        longest, limit = max(prompts, key=len), max_positions(self.model)
        if limit is not None and len(longest) + max_new_tokens > limit:
            raise ContextError(
                f"context overflow: the longest prompt has {len(longest)} tokens (ids "
                f"{longest[:8]}...), and with {max_new_tokens} new ones exceeds the model's {limit}"
            )

    @torch.no_grad()
    def generate(
        self,
        prompts_token_ids: list[list[int]],
        samples_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        seed_key: tuple[int | str, ...],
    ) -> RolloutBatch:
        """Sample up to `max_new_tokens` tokens for each prompt; temperature 0 is greedy.

        The same arguments and weights give the same tokens, bit for bit.
        """
        self.check_fits(prompts_token_ids, max_new_tokens)
        model, top = decoder(self.model), head(self.model).first(self.classes)
        device = top.weight.device
        generator = torch.Generator(device).manual_seed(seed_from(*seed_key))
        eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device)

        ids, mask = _left_padded(prompts_token_ids, device)
        cache = DynamicCache(config=self.model.config)
        hidden = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        cache.batch_repeat_interleave(samples_per_prompt)
        hidden = hidden.repeat_interleave(samples_per_prompt, dim=0)
        mask = mask.repeat_interleave(samples_per_prompt, dim=0)
        position = mask.sum(1)  # of the next token

        batch = hidden.shape[0]
        rows = torch.arange(batch, device=device)  # which response each row of the cache belongs to
        alive = torch.ones(batch, dtype=torch.bool, device=device)  # rows that have not ended
        tokens = torch.zeros(batch, max_new_tokens, dtype=torch.int64, device=device)
        lengths = torch.full((batch,), max_new_tokens, device=device)
        by_eos = torch.zeros(batch, dtype=torch.bool, device=device)
        for index in range(max_new_tokens):
            token = _sample(top.logits(hidden), temperature, generator)
            tokens[rows, index] = torch.where(alive, token, 0)
            ended = alive & torch.isin(token, eos)
            lengths[rows[ended]] = index + 1
            by_eos[rows[ended]] = True
            alive = alive & ~ended
            count = int(alive.sum())
            if count == 0 or index + 1 == max_new_tokens:
                break
            if 2 * count < len(rows):  # mostly finished rows: stop computing them
                kept = alive.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, token, mask, position = rows[kept], token[kept], mask[kept], position[kept]
                alive = alive[kept]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            hidden = model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            position = position + 1
        return RolloutBatch(
            prompts=[p for p in prompts_token_ids for _ in range(samples_per_prompt)],
            tokens=tokens.cpu(),
            lengths=lengths.cpu(),
            finished_by_eos=by_eos.cpu(),
        )


def _left_padded(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, P], both 0 in the padding."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token a row from softmax(logits / temperature), by an exponential race: [B, V] -> [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits / temperature - noise.log()).argmax(dim=-1)
