"""Fused ops for on-policy distillation: divergences, log-probs, sampling and decode attention."""

from esr_kernels.attention.op import RowGroups, group_rows, shared_prefix_attention
from esr_kernels.common.workspace import default_memory_budget, release_workspace
from esr_kernels.divergence.losses import (
    JSD,
    Divergence,
    ForwardKL,
    Jeffreys,
    KLMix,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from esr_kernels.divergence.module import LinearDivergenceLoss
from esr_kernels.divergence.op import LinearDivergence, linear_divergence
from esr_kernels.divergence.plan import Plan
from esr_kernels.divergence.planner import plan_linear_divergence
from esr_kernels.sampling.op import (
    Sample,
    SampleKeys,
    SamplingParams,
    sample_from_hidden,
    sample_from_logits,
)
from esr_kernels.scoring.token_logprob import TokenLogprob, token_logprob
from esr_kernels.scoring.topk import TopkDivergence, linear_topk_divergence

__all__ = [
    "JSD",
    "Divergence",
    "ForwardKL",
    "Jeffreys",
    "KLMix",
    "LinearDivergence",
    "LinearDivergenceLoss",
    "Plan",
    "ReverseKL",
    "RowGroups",
    "Sample",
    "SampleKeys",
    "SamplingParams",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "TokenLogprob",
    "TopkDivergence",
    "default_memory_budget",
    "group_rows",
    "linear_divergence",
    "linear_topk_divergence",
    "plan_linear_divergence",
    "release_workspace",
    "sample_from_hidden",
    "sample_from_logits",
    "shared_prefix_attention",
    "token_logprob",
]
