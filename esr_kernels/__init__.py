"""Fused ops for on-policy distillation: exact two-model divergences from hidden states."""

from esr_kernels.divergences import JSD, Divergence, ForwardKL, KLMix, ReverseKL
from esr_kernels.linear_divergence import LinearDivergence, linear_divergence
from esr_kernels.plan import Plan, default_memory_budget, plan_linear_divergence

__all__ = [
    "JSD",
    "Divergence",
    "ForwardKL",
    "KLMix",
    "LinearDivergence",
    "Plan",
    "ReverseKL",
    "default_memory_budget",
    "linear_divergence",
    "plan_linear_divergence",
]
