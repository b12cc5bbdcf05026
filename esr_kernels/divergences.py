"""The divergences between a teacher's and a student's next-token distributions.

With p the student's and q the teacher's distribution over the classes, every divergence here is a
sum over classes of a *summand* d(log p, log q), and its gradient with respect to the student's
logits z has one shape:

    dD/dz = u - p * sum(u)

where the *pull* u(log p, log q) = p * dD/dp, up to multiples of p, which cancel. A new divergence
is those two functions. Terms with zero probability contribute zero (0 log 0 = 0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Base of all divergences; an instance is hashable and carries its parameters."""

    def summand(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Elementwise d(log p, log q); the divergence is its sum over classes."""
        raise TypeError("Divergence is abstract: use one of its subclasses")

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Elementwise u(log p, log q); the gradient for the logits is u - p * sum(u)."""
        raise TypeError("Divergence is abstract: use one of its subclasses")


def _weighted_gap(log_w: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """exp(log_w) * (log_a - log_b), and 0 where the weight is 0."""
    w = log_w.exp()
    return torch.where(w > 0, w * (log_a - log_b), torch.zeros_like(w))


def _log_mixture(beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(beta * q + (1 - beta) * p), for 0 < beta < 1."""
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(q || p) = sum q (log q - log p): mass-covering; gradient p - q."""

    def summand(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _weighted_gap(log_q, log_q, log_p)

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -log_q.exp()


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p || q) = sum p (log p - log q): mode-seeking; gradient p (log p - log q - KL)."""

    def summand(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _weighted_gap(log_p, log_p, log_q)

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _weighted_gap(log_p, log_p, log_q)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p.

    The convention of GKD (arXiv 2306.13649), TRL and Liger. Both ends of beta vanish identically,
    so 0 < beta < 1; say ForwardKL or ReverseKL for the limits that those libraries put there.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD beta must lie strictly between 0 and 1, got {self.beta}; "
                "use ForwardKL() or ReverseKL() for the ends"
            )

    def summand(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mixture(self.beta, log_p, log_q)
        return self.beta * _weighted_gap(log_q, log_q, log_m) + (1 - self.beta) * _weighted_gap(
            log_p, log_p, log_m
        )

    def pull(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        log_m = _log_mixture(self.beta, log_p, log_q)
        return (1 - self.beta) * _weighted_gap(log_p, log_p, log_m)


_BY_NAME: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": JSD(),
}


def resolve_divergence(divergence: Divergence | str) -> Divergence:
    """Turn a name such as "reverse_kl" into its divergence; pass a divergence through."""
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str) and divergence in _BY_NAME:
        return _BY_NAME[divergence]
    raise ValueError(
        f"divergence must be one of {sorted(_BY_NAME)} or a Divergence instance, got {divergence!r}"
    )
