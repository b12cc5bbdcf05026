"""Functions that several references in plain PyTorch share."""

from __future__ import annotations

import torch
from torch import Tensor


def transformed_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    classes: slice | Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """softcap * tanh(scale * (h W^T + b) / softcap) / temperature, over `classes`."""
    logits = hidden.to(dtype) @ weight[classes].to(dtype).T
    if bias is not None:
        logits = logits + bias[classes].to(dtype)
    logits = logits * scale
    if softcap is not None:
        # A class that a bias of -inf removed stays removed: its tanh of -1 is a finite logit.
        removed = logits == -torch.inf
        logits = torch.where(removed, -torch.inf, softcap * torch.tanh(logits / softcap))
    return logits / temperature


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row; classes of probability 0 in `a` contribute 0 and no gradient."""
    live = log_a != -torch.inf  # true for NaN
    log_ratio = torch.where(live, log_a, 0.0) - torch.where(live, log_b, 0.0)
    return (torch.where(live, log_a, -torch.inf).exp() * log_ratio).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of each row; classes of probability 0 contribute 0 and no gradient."""
    return -(log_p.exp() * torch.where(log_p != -torch.inf, log_p, 0.0)).sum(-1)
