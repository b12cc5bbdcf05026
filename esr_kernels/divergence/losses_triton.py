"""The two functions of a divergence in Triton, for the row passes; see `losses`."""

import triton
import triton.language as tl

from esr_kernels.common.logits_triton import expm1, log1p
from esr_kernels.divergence.losses import KernelKind

_JSD = tl.constexpr(KernelKind.JSD.value)
_SKEW_FORWARD_KL = tl.constexpr(KernelKind.SKEW_FORWARD_KL.value)
_SKEW_REVERSE_KL = tl.constexpr(KernelKind.SKEW_REVERSE_KL.value)
KL_MIX = tl.constexpr(KernelKind.KL_MIX.value)


@triton.jit
def log_ratio_of(s, t, lse_difference, p, q):
    """log q - log p within +-80; 0 where both probabilities are 0."""
    log_ratio = tl.minimum(tl.maximum(t - s + lse_difference, -80.0), 80.0)
    return tl.where((p == 0) & (q == 0), 0.0, log_ratio)


@triton.jit
def summand_and_pull(p, q, log_ratio, parameter, KIND: tl.constexpr):
    """The two functions of a divergence that takes two passes, as in `losses`."""
    if KIND == _JSD:
        log_m = log1p(parameter * expm1(log_ratio))
        pull = (parameter - 1.0) * p * log_m
        summand = pull + parameter * q * (log_ratio - log_m)
    elif KIND == _SKEW_FORWARD_KL:
        log_m = log1p(parameter * expm1(log_ratio))
        pull = (parameter - 1.0) * q * tl.exp(-log_m)
        summand = q * (log_ratio - log_m)
    elif KIND == _SKEW_REVERSE_KL:
        log_m = log1p((1.0 - parameter) * expm1(log_ratio))
        pull = -p * (log_m + parameter * expm1(-log_m))
        summand = -p * log_m
    else:  # TotalVariation
        pull = -0.5 * p * ((log_ratio > 0).to(tl.float32) - (log_ratio < 0).to(tl.float32))
        summand = 0.5 * tl.abs(p - q)
    return summand, pull
