"""Logits of the yardstick, plain PyTorch: how a device multiplies, and what it rounds.

A GPU multiplies 16-bit operands into fp32 logits; PyTorch has no such product on a CPU, where the
operands are converted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_kernels.common import matmul


class _Fp32Logits(torch.autograd.Function):
    """hidden @ weight.T of 16-bit operands on a GPU, whose matrix units sum in fp32 their own way:
    they truncate, which makes logits a few millionths smaller than a product of fp32 operands."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        return (dz @ weight.float()).to(hidden.dtype), (dz.T @ hidden.float()).to(weight.dtype)


def multiplies_in_16_bits(hidden: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch has a product of these operands with an fp32 result, as GPUs do."""
    same = hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2
    return same and matmul._widens(hidden)  # not where a sanitizer says that a CPU is a GPU


def fp32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in fp32 with autograd, as PyTorch multiplies operands of their dtype on
    their device; gradients are rounded to it once."""
    if multiplies_in_16_bits(hidden, weight):
        return _Fp32Logits.apply(hidden, weight)
    return hidden.float() @ weight.float().T


def behind_identity(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, weight) of the same fp32 logits: they are the hidden states of an identity head."""
    logits = fp32_logits(hidden, weight)
    return logits, torch.eye(logits.shape[1], device=logits.device)


class RoundGradient(torch.autograd.Function):
    """Identity whose gradient is rounded to a dtype and back, as in front of a 16-bit GEMM."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # fp16 underflows, so training with it scales the loss.
        scale = 2.0**12 if ctx.dtype == torch.float16 else 1.0
        return (gradient * scale).to(ctx.dtype).to(gradient.dtype) / scale, None


def behind_rounding(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias) of the same logits, whose gradient is rounded to the operands' dtype.

    The fp32 logits become hidden states in front of an identity head. Classes that a bias of -inf
    removes are left to the new bias: 0 * inf would make every logit NaN.
    """
    logits, removed = fp32_logits(hidden, weight), None
    if bias is not None:
        dead = bias.detach().isinf()  # +inf removes a class where the scale is negative
        logits = logits + torch.where(dead, 0.0, bias.float())
        removed = torch.where(dead, bias.detach().float(), 0.0)
    rounded = RoundGradient.apply(logits, hidden.dtype)
    return rounded, torch.eye(logits.shape[1], device=logits.device), removed
