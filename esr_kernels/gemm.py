"""Matrix products whose result keeps fp32 whatever the operands: the one place that knows how.

Rounding logits to bf16 before the softmax costs 4-23 % of gradient error while the loss hardly
moves, so the projection must not. A product of two bf16 or fp16 numbers is exact in fp32, and the
GPU accumulates in fp32: asking for that output is free. PyTorch has no such product on CPU, where
the operands are converted instead, the weight in strips so that no fp32 copy of a head exists.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Set where a sanitizer executes the GPU's code path on CPU memory: PyTorch's products stay the
# CPU's there, whatever device the tensors claim.
KERNELS_ON_CPU = os.environ.get("ESR_TRITON_ON_CPU") == "1"
_STRIP_ELEMENTS = 1 << 22


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits of `dtype` operands are held in: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widens(operand: Tensor) -> bool:
    """Whether products of 16-bit operands can be had with fp32 output."""
    return operand.device.type == "cuda" and not KERNELS_ON_CPU


def _strips(rows: int, columns: int) -> range:
    return range(0, rows, max(1, _STRIP_ELEMENTS // max(columns, 1)))


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out = hidden @ weight.T, [n, D] x [V, D] -> [n, V], fp32 out of any operands."""
    if hidden.dtype == weight.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    if _widens(hidden) and hidden.dtype == weight.dtype:
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    strips = _strips(*weight.shape)
    for start in strips:
        strip = slice(start, start + strips.step)
        torch.mm(hidden, weight[strip].to(out.dtype).T, out=out[:, strip])
    return out


def hidden_gradient(
    dz: Tensor, weight: Tensor, out: Tensor, *, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * dz @ weight, [n, V] x [V, D] -> [n, D]."""
    if dz.dtype == weight.dtype:
        _mm(dz, weight, out, alpha, accumulate)
        return
    strips = _strips(*weight.shape)
    total = torch.zeros(out.shape, dtype=dz.dtype, device=out.device)
    for start in strips:
        strip = slice(start, start + strips.step)
        total.addmm_(dz[:, strip], weight[strip].to(dz.dtype), alpha=alpha)
    out.copy_(total + out if accumulate else total)


def weight_gradient(
    dz: Tensor, hidden: Tensor, out: Tensor, *, alpha: float, accumulate: bool
) -> None:
    """out (+)= alpha * dz.T @ hidden, [n, V] x [n, D] -> [V, D]."""
    if dz.dtype == hidden.dtype:
        _mm(dz.T, hidden, out, alpha, accumulate)
        return
    hidden = hidden.to(dz.dtype)
    strips = _strips(*out.shape)
    for start in strips:
        strip = slice(start, start + strips.step)
        _mm(dz[:, strip].T, hidden, out[strip], alpha, accumulate)


def _mm(a: Tensor, b: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    """out = alpha * a @ b + accumulate * out, rounded once, to the dtype of `out`."""
    beta = 1.0 if accumulate else 0.0
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif _widens(a):
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)
    else:
        product = torch.mm(a.float(), b.float()).mul_(alpha)
        out.copy_(out + product if accumulate else product)
