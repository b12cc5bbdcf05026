"""How far the log-probs that the engine sampled with are from those that are trained.

The engine decodes token by token over cached keys and values; training runs whole sequences. Both
should compute the same distribution up to rounding; if not, training is not on-policy. Dropout is
left out of this pass: the engine has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from esr_kernels import token_logprob
from esr_train.models import decoder, head
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.teacher import hidden_rows, sequences

_RESPONSES = 4


@torch.no_grad()
def logprob_gap(
    rollout: PrefixRollout,
    batch: RolloutBatch,
    temperature: float,
    forward: Callable[..., Any] | None,
) -> float:
    """Mean |difference| in nats over the tokens of the first responses of `batch`."""
    assert batch.logprob is not None
    some = batch.select(torch.arange(min(_RESPONSES, len(batch.prompts))))
    sampled = torch.arange(some.tokens.shape[1]) < some.lengths[:, None]
    device = next(decoder(rollout.model).parameters()).device
    hidden = hidden_rows(rollout.model, sequences(some, sampled.float(), device), forward)
    known = head(rollout.model)
    found = token_logprob(
        hidden,
        known.weight,
        some.tokens[sampled].to(device),
        bias=known.bias,
        softcap=known.softcap,
        logit_scale=known.scale,
        temperature=temperature or 1.0,
        num_classes=rollout.classes,
    )
    assert some.logprob is not None
    return float((found.logprob.cpu() - some.logprob[sampled]).abs().mean())
