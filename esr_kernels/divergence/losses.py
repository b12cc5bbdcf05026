"""The divergences between a teacher's and a student's next-token distributions.

With p the student's and q the teacher's probability of a class, and log_ratio = log q - log p,
every divergence is a sum over classes of a *summand* d(p, q, log_ratio), and its gradient with
respect to the student's logits z is

    dD/dz = u - p * sum(u)

where the *pull* u(p, q, log_ratio) is p * dD/dp up to multiples of p, which cancel: choose the
multiple for which it is small where p is large. A new divergence is those two functions. They take
log_ratio rather than the two logarithms because it keeps its digits when student and teacher nearly
agree, which is the usual case in on-policy distillation.
"""

from __future__ import annotations

import difflib
import enum
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common.arguments import check_number

# exp(80) is finite in fp32, and of two probabilities e**80 apart the smaller one is negligible.
_LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class Divergence:
    """Base of all divergences; an instance is hashable and carries its parameters."""

    @property
    def kl_weights(self) -> tuple[float, float] | None:
        """(a, b) where this is a KL(q||p) + b KL(p||q), else None.

        Such a mix follows from the statistics of one pass over the row and its pull is
        -a q - b p log_ratio; it needs neither `summand` nor `pull`. All others take a second pass.
        """
        return None

    def summand(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        """Elementwise d(p, q, log_ratio); the divergence is its sum over classes."""
        raise TypeError("Divergence is abstract: use one of its subclasses")

    def pull(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        """Elementwise u(p, q, log_ratio); the gradient for the logits is u - p * sum(u)."""
        raise TypeError("Divergence is abstract: use one of its subclasses")


@dataclass(frozen=True)
class KLMix(Divergence):
    """forward * KL(q || p) + reverse * KL(p || q), both weights non-negative."""

    forward: float
    reverse: float

    def __post_init__(self) -> None:
        check_number("KLMix forward", self.forward)
        check_number("KLMix reverse", self.reverse)
        finite = math.isfinite(self.forward) and math.isfinite(self.reverse)
        if not finite or min(self.forward, self.reverse) < 0 or self.forward + self.reverse == 0:
            raise ValueError(
                "KLMix weights must be finite, non-negative and not both 0, "
                f"got forward={self.forward}, reverse={self.reverse}"
            )

    @property
    def kl_weights(self) -> tuple[float, float]:
        return self.forward, self.reverse


@dataclass(frozen=True)
class ForwardKL(KLMix):
    """KL(q || p) = sum q (log q - log p): mass-covering; gradient p - q."""

    forward: float = 1.0
    reverse: float = 0.0


@dataclass(frozen=True)
class ReverseKL(KLMix):
    """KL(p || q) = sum p (log p - log q): mode-seeking; gradient p (log p - log q - KL)."""

    forward: float = 0.0
    reverse: float = 1.0


@dataclass(frozen=True)
class Jeffreys(KLMix):
    """KL(q || p) + KL(p || q): symmetric in student and teacher."""

    forward: float = 1.0
    reverse: float = 1.0


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _log_mixture(log_ratio: Tensor, teacher_share: float) -> Tensor:
    """log(m / p) for m = teacher_share * q + (1 - teacher_share) * p, from a clamped log_ratio."""
    return torch.log1p(teacher_share * torch.expm1(log_ratio))


def _check_share(name: str, value: float, ends: str) -> None:
    check_number(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}; {ends}")


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1-beta) p.

    The convention of GKD (arXiv 2306.13649), TRL and Liger. It is 0 for beta 0 and beta 1, so
    0 < beta < 1; use ForwardKL or ReverseKL for what those libraries compute there.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_share("JSD beta", self.beta, "use ForwardKL() or ReverseKL() for the ends")

    def summand(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        log_ratio = _clamped(log_ratio)
        log_m = _log_mixture(log_ratio, self.beta)
        return self.beta * q * (log_ratio - log_m) - (1 - self.beta) * p * log_m

    def pull(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return (self.beta - 1) * p * _log_mixture(_clamped(log_ratio), self.beta)


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(q || alpha q + (1 - alpha) p): forward KL that stays finite where p vanishes.

    Skew KL of DistiLLM (arXiv 2402.03898); alpha -> 0 is ForwardKL.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_share("SkewForwardKL alpha", self.alpha, "use ForwardKL() for alpha 0")

    def summand(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        log_ratio = _clamped(log_ratio)
        return q * (log_ratio - _log_mixture(log_ratio, self.alpha))

    def pull(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        # q p / m, with no multiple of p: q / m vanishes on most of p where the models differ.
        return (self.alpha - 1) * q * torch.exp(-_log_mixture(_clamped(log_ratio), self.alpha))


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q): reverse KL that stays finite where q vanishes.

    Skew reverse KL of DistiLLM (arXiv 2402.03898); alpha -> 0 is ReverseKL.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_share("SkewReverseKL alpha", self.alpha, "use ReverseKL() for alpha 0")

    def summand(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return -p * _log_mixture(_clamped(log_ratio), 1 - self.alpha)

    def pull(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        log_m = _log_mixture(_clamped(log_ratio), 1 - self.alpha)
        return -p * (log_m + self.alpha * torch.expm1(-log_m))


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """sum |p - q| / 2, in [0, 1]; the gradient takes sign(0) = 0."""

    def summand(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return 0.5 * (p - q).abs()

    def pull(self, p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
        return -0.5 * p * torch.sign(log_ratio)


class KernelKind(enum.IntEnum):
    """The kinds of divergence that compiled row passes (Triton, C) have, and their numbers."""

    KL_MIX = 0
    JSD = 1
    SKEW_FORWARD_KL = 2
    SKEW_REVERSE_KL = 3
    TOTAL_VARIATION = 4


class KernelForm(NamedTuple):
    """A divergence as compiled row passes take it."""

    kind: KernelKind
    a: float = 0.0  # weight of KL(q || p), beta or alpha
    b: float = 0.0  # weight of KL(p || q)


def kernel_form(divergence: Divergence) -> KernelForm | None:
    """The form of `divergence` in compiled row passes; None if they do not have it."""
    if divergence.kl_weights is not None:
        return KernelForm(KernelKind.KL_MIX, *divergence.kl_weights)
    # By exact type: a subclass may compute something else.
    if type(divergence) is JSD:
        return KernelForm(KernelKind.JSD, divergence.beta)
    if type(divergence) is SkewForwardKL:
        return KernelForm(KernelKind.SKEW_FORWARD_KL, divergence.alpha)
    if type(divergence) is SkewReverseKL:
        return KernelForm(KernelKind.SKEW_REVERSE_KL, divergence.alpha)
    if type(divergence) is TotalVariation:
        return KernelForm(KernelKind.TOTAL_VARIATION)
    return None


_BY_NAME: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jeffreys": Jeffreys(),
    "jsd": JSD(),
    "skew_forward_kl": SkewForwardKL(),
    "skew_reverse_kl": SkewReverseKL(),
    "total_variation": TotalVariation(),
}


def resolve_divergence(divergence: Divergence | str) -> Divergence:
    """Turn a name such as "reverse_kl" into its divergence; pass a divergence through."""
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str) and divergence in _BY_NAME:
        return _BY_NAME[divergence]
    near: list[str] = []
    if not torch.compiler.is_compiling():  # a compiler cannot trace difflib
        near = difflib.get_close_matches(str(divergence), _BY_NAME, n=1)
    raise ValueError(
        f"divergence must be one of {sorted(_BY_NAME)} or a Divergence instance, got {divergence!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )
