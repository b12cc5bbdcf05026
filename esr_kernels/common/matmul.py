"""Matrix products with fp32 results for operands of any dtype.

Rounding logits to bf16 before the softmax adds 4-23 % of gradient error while the loss hardly
changes, so logits are not rounded. A product of two bf16 or fp16 numbers is exact in fp32, and the
GPU accumulates in fp32, so fp32 output costs nothing. PyTorch has no such product on CPU. There the
operands are converted, the weight in strips, so that no fp32 copy of a head exists. Strips are also
used for vocabulary maps: `ids` selects rows of a head, one strip at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.common.workspace import borrow

# Set if a sanitizer executes the GPU code path on CPU memory. PyTorch's products run on the CPU
# then, although the tensors may report another device.
KERNELS_ON_CPU = os.environ.get("ESR_TRITON_ON_CPU") == "1"
_STRIP_ELEMENTS = 1 << 22


def plain_precision(like: Tensor) -> torch.autocast:
    """Turns autocast off: operands have been cast already, and logits are fp32."""
    return torch.autocast(like.device.type, enabled=False)


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits for operands of `dtype`: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widens(operand: Tensor) -> bool:
    """Whether products of 16-bit operands can have fp32 output."""
    return operand.device.type == "cuda" and not KERNELS_ON_CPU


def _strips(
    weight: Tensor, ids: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(classes, their rows of the head in `dtype`), in one strip where nothing must be copied."""
    classes = weight.shape[0] if ids is None else ids.shape[0]
    copies = ids is not None or weight.dtype != dtype
    step = max(1, _STRIP_ELEMENTS // max(weight.shape[1], 1)) if copies else max(classes, 1)
    for start in range(0, classes, step):
        strip = slice(start, min(start + step, classes))
        rows = weight[strip] if ids is None else weight.index_select(0, ids[strip])
        yield strip, rows.to(dtype)


def project(hidden: Tensor, weight: Tensor, out: Tensor, ids: Tensor | None = None) -> Tensor:
    """out = hidden @ weight[ids].T, [n, D] x [V, D] -> [n, V], fp32 out of any operands."""
    widens = _widens(hidden) and hidden.dtype == weight.dtype
    dtype = hidden.dtype if widens else out.dtype
    hidden = hidden.to(dtype)
    for strip, rows in _strips(weight, ids, dtype):
        part = out[:, strip]
        if dtype != out.dtype:
            torch.mm(hidden, rows.T, out_dtype=out.dtype, out=part)
        elif hidden.is_cuda or not cpu.project_transposed(hidden, rows, part, borrow):
            torch.mm(hidden, rows.T, out=part)
    return out


def hidden_gradient(
    dz: Tensor,
    weight: Tensor,
    out: Tensor,
    ids: Tensor | None = None,
    *,
    alpha: float,
    accumulate: bool,
) -> None:
    """out (+)= alpha * dz @ weight[ids], [n, V] x [V, D] -> [n, D]."""
    if ids is None and dz.dtype == weight.dtype:
        _mm(dz, weight, out, alpha, accumulate)
        return
    # Summed over strips in fp32, rounded once.
    total = torch.zeros(out.shape, dtype=logits_dtype(dz.dtype), device=out.device)
    for strip, rows in _strips(weight, ids, dz.dtype):
        _mm(dz[:, strip], rows, total, alpha, True)
    out.copy_(total + out if accumulate else total)


def weight_gradient(
    dz: Tensor,
    hidden: Tensor,
    out: Tensor,
    ids: Tensor | None = None,
    *,
    alpha: float,
    accumulate: bool,
) -> None:
    """out[ids] (+)= alpha * dz.T @ hidden, [n, V] x [n, D] -> [V, D]; the ids are distinct."""
    hidden = hidden.to(dz.dtype)
    classes = dz.shape[1]
    copies = ids is not None or not (dz.dtype == out.dtype or _widens(dz))
    step = max(1, _STRIP_ELEMENTS // max(hidden.shape[1], 1)) if copies else classes
    for start in range(0, classes, step):
        strip = slice(start, min(start + step, classes))
        if ids is None:
            _mm(dz[:, strip].T, hidden, out[strip], alpha, accumulate)
            continue
        rows = out.new_empty(strip.stop - start, hidden.shape[1])
        _mm(dz[:, strip].T, hidden, rows, alpha, False)
        if accumulate:
            out.index_add_(0, ids[strip], rows)
        else:
            out.index_copy_(0, ids[strip], rows)


def _mm(a: Tensor, b: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    """out = alpha * a @ b + accumulate * out, rounded once, to the dtype of `out`."""
    beta = 1.0 if accumulate else 0.0
    if a.dtype.itemsize == 2 and (KERNELS_ON_CPU or a.device.type == "cpu"):
        # For kernels that are tested without a GPU. With an odd number of columns, oneDNN's AMX
        # product of bf16 reads one element past each row and multiplies it by 0; in the padding
        # between rows that may be NaN.
        a = a.contiguous()
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    elif _widens(a):
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out_dtype=out.dtype, out=out)
    else:
        product = torch.mm(a.float(), b.float()).mul_(alpha)
        out.copy_(out + product if accumulate else product)
