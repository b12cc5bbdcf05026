"""The teacher, and how hidden states at response positions are read, for both models.

Row t of a response is the hidden state that predicts its token t; for the first token that is the
last position of the prompt. Only these rows are kept, so no logits are computed for others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esr_train.models import Head, decoder, head
from esr_train.rollout import PrefixRollout, RolloutBatch


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as right-padded model input, and the positions that are trained on."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L]
    rows: Tensor  # [T] int64 into the flattened [B * L] positions
    weights: Tensor  # [T] fp32, the weight of each row's token in the loss
    tokens: Tensor  # [T] int64, the position of each row's token in its response


def sequences(batch: RolloutBatch, weights: Tensor, device: torch.device) -> Sequences:
    """Lay out a batch; only tokens with a non-zero weight in `weights` [B, N] become rows."""
    starts = [len(prompt) for prompt in batch.prompts]
    width = max(start + int(n) for start, n in zip(starts, batch.lengths, strict=True))
    ids = torch.zeros(len(starts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch.prompts):
        sequence = prompt + batch.response(row)
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    response, token = weights.nonzero(as_tuple=True)
    rows = response * width + torch.tensor(starts)[response] - 1 + token
    row_weights = weights[response, token]
    return Sequences(*(x.to(device) for x in (ids, mask, rows, row_weights, token)))


def hidden_rows(model: Any, batch: Sequences, forward: Callable[..., Any] | None = None) -> Tensor:
    """The model's hidden states [T, D] at the rows of a batch, differentiable.

    `forward` is its decoder, compiled; None calls the decoder as it is.
    """
    # Right padding: causal attention does not reach it, and positions count from 0.
    run = decoder(model) if forward is None else forward
    output = run(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)[batch.rows]


class Teacher:
    """A frozen model in the same process; `rollout` samples its text.

    Its weights may be those that the student has below its adapters (`models.load_pair`): nobody
    writes to them.
    """

    def __init__(self, rollout: PrefixRollout, forward: Callable[..., Any] | None = None) -> None:
        self.rollout, self.forward = rollout, forward
        self.model = rollout.model.requires_grad_(False)

    @property
    def head(self) -> Head:
        """What turns its hidden states into logits."""
        return head(self.model)

    @torch.no_grad()
    def hidden_rows(self, batch: Sequences) -> Tensor:
        """Hidden states [T, D] at the rows of a batch."""
        return hidden_rows(self.model, batch, self.forward)


class DistantTeacher(Teacher):
    """A teacher with a device of its own: token ids go there, hidden states come back, and `head`
    is a copy on `device`, the student's."""

    def __init__(
        self,
        rollout: PrefixRollout,
        device: torch.device,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(rollout, forward)
        own = super().head
        self._own, self._device = own.weight.device, device
        bias = None if own.bias is None else own.bias.to(device)
        self._head = replace(own, weight=own.weight.to(device), bias=bias)

    @property
    def head(self) -> Head:
        return self._head

    def hidden_rows(self, batch: Sequences) -> Tensor:
        """Hidden states [T, D] at the rows of a batch, on the student's device."""
        there = Sequences(**{name: x.to(self._own) for name, x in vars(batch).items()})
        return super().hidden_rows(there).to(self._device)
