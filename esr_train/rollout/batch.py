"""The responses of a rollout, as tensors on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RolloutBatch:
    """B = prompts x samples responses, the samples of one prompt next to each other.

    `PrefixRollout` fills all fields; the last four may be None in a batch made by hand.
    """

    prompts: list[list[int]]  # token ids, one list per response
    tokens: Tensor  # [B, N] int64; 0 from `lengths` on
    lengths: Tensor  # [B] int64, EOS counted
    finished_by_eos: Tensor  # [B] bool, by any of the engine's stop ids; False: cut at N
    # [B, N] fp32, log softmax(logits / temperature)[token] over the whole vocabulary, before any
    # filter; 0 from `lengths` on. For greedy rows, at temperature 1.
    logprob: Tensor | None = None
    # [B, N] fp32, log of the probability mass that the filters kept; 0 without filters. A token was
    # drawn with log-probability logprob - log_kept.
    log_kept: Tensor | None = None
    # [B] int64: with the same prompt, seed_key and row key a response can be sampled again alone.
    row_keys: Tensor | None = None
    # [B] int64: the token id that ended each response, -1 where it was cut at N.
    finished_by: Tensor | None = None

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
            finished_by=cut(self.finished_by),
        )


def joined(batches: list[RolloutBatch]) -> RolloutBatch:
    """The responses of batches of one N, one batch after the other."""
    if len(batches) == 1:
        return batches[0]
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(RolloutBatch)):
        parts = [getattr(batch, name) for batch in batches]
        if name == "prompts":
            columns[name] = [prompt for part in parts for prompt in part]
        else:
            columns[name] = None if parts[0] is None else torch.cat(parts)
    return RolloutBatch(**columns)
