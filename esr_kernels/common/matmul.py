"""Matrix products with fp32 results for operands of any dtype.

Rounding logits to bf16 before the softmax adds 4-23 % of gradient error while the loss hardly
changes, so logits are not rounded. A product of two bf16 or fp16 numbers is exact in fp32, and the
GPU accumulates in fp32, so fp32 output costs nothing. PyTorch has no such product on CPU. There the
operands are converted, the weight in strips, so that no fp32 copy of a head exists. Strips are also
used for vocabulary maps: `ids` selects rows of a head, one strip at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from esr_kernels import cpu
from esr_kernels.common.full_precision import full_precision
from esr_kernels.common.widening import widening
from esr_kernels.common.workspace import borrow

# Set if a sanitizer executes the GPU code path on CPU memory. PyTorch's products run on the CPU
# then, although the tensors may report another device.
KERNELS_ON_CPU = os.environ.get("ESR_TRITON_ON_CPU") == "1"
WIDENING = widening(torch.__version__, rocm=torch.version.hip is not None)
# Elements of an operand that are gathered, converted or summed apart at a time: on CPU what stays
# in the cache, on a GPU enough for every product to fill the machine (38,016 classes of 1,536).
_STRIP_ELEMENTS = {"cpu": 1 << 22, "gpu": 1 << 26}
_STRIP_STEP = 64
_AS_IT_IS = contextlib.nullcontext()


def plain_precision(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """Turns autocast off: operands have been cast already, and logits are fp32."""
    if not torch.is_autocast_enabled(like.device.type):
        return _AS_IT_IS  # A tenth of the time, at every call.
    return torch.autocast(like.device.type, enabled=False)


def logits_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits for operands of `dtype`: fp32, or fp64 for fp64 operands."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_gpu(operand: Tensor) -> bool:
    return operand.is_cuda and not KERNELS_ON_CPU  # `device.type` takes four times as long.


def _widens(operand: Tensor) -> bool:
    """Whether products of 16-bit operands can have fp32 output."""
    return _on_gpu(operand) and WIDENING.mm


def strip_rows(rows: int, columns: int, device: str) -> int:
    """How many rows of a matrix are copied at a time, where they must be: even strips, which start
    at aligned columns of the logits."""
    elements = _STRIP_ELEMENTS["cpu" if device == "cpu" else "gpu"]
    strips = -(-rows * columns // elements)
    if strips <= 1:
        return max(rows, 1)
    return -(-rows // (strips * _STRIP_STEP)) * _STRIP_STEP


def _slices(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


def _strips(
    weight: Tensor, ids: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """(classes, their rows of the head in `dtype`), in one strip where nothing must be copied."""
    classes = weight.shape[0] if ids is None else ids.shape[0]
    step = classes
    if ids is not None or weight.dtype != dtype:
        step = strip_rows(classes, weight.shape[1], weight.device.type)
    # One buffer for all strips: a new one would be taken before the last is given back.
    gathered = None if ids is None else weight.new_empty(step, weight.shape[1])
    for strip in _slices(classes, step):
        if ids is None or gathered is None:
            rows = weight[strip]
        else:
            rows = gathered[: strip.stop - strip.start]
            torch.index_select(weight, 0, ids[strip], out=rows)
        yield strip, rows.to(dtype)


def project(hidden: Tensor, weight: Tensor, out: Tensor, ids: Tensor | None = None) -> Tensor:
    """out = hidden @ weight[ids].T, [n, D] x [V, D] -> [n, V], fp32 out of any operands."""
    widens = _widens(hidden) and hidden.dtype == weight.dtype
    dtype = hidden.dtype if widens else out.dtype
    if hidden.dtype != dtype:
        hidden = hidden.to(dtype)
    if ids is None and weight.dtype == dtype:
        _project(hidden, weight, out)
    else:
        for strip, rows in _strips(weight, ids, dtype):
            _project(hidden, rows, out[:, strip])
    return out


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if _on_gpu(hidden):
        _mm(hidden, weight.t(), out, 1.0, False)
    elif not cpu.project_transposed(hidden, weight, out, borrow):
        torch.mm(hidden, weight.t(), out=out)


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
    if accumulate:
        out.add_(total)
    else:
        out.copy_(total)


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
    if hidden.dtype != dz.dtype:
        hidden = hidden.to(dz.dtype)
    if ids is None and (dz.dtype == out.dtype or _widens(dz)):
        _mm(dz.t(), hidden, out, alpha, accumulate)
        return
    classes = dz.shape[1]
    step = strip_rows(classes, hidden.shape[1], dz.device.type)
    apart = None if ids is None else out.new_empty(step, hidden.shape[1])
    for strip in _slices(classes, step):
        if ids is None or apart is None:
            _mm(dz[:, strip].T, hidden, out[strip], alpha, accumulate)
            continue
        rows = apart[: strip.stop - strip.start]
        _mm(dz[:, strip].T, hidden, rows, alpha, False)
        if accumulate:
            out.index_add_(0, ids[strip], rows)
        else:
            out.index_copy_(0, ids[strip], rows)


def _mm(a: Tensor, b: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    """out = alpha * a @ b + accumulate * out, rounded once, to the dtype of `out`."""
    on_gpu = _on_gpu(a)
    if a.dtype.itemsize == 2 and (KERNELS_ON_CPU or a.device.type == "cpu"):
        # For kernels that are tested without a GPU. With an odd number of columns, oneDNN's AMX
        # product of bf16 reads one element past each row and multiplies it by 0; in the padding
        # between rows that may be NaN.
        a = a.contiguous()
    widens = _widens(a)
    multiplied = a.dtype if widens or a.dtype == out.dtype else torch.float32
    with full_precision(multiplied, out.dtype) if on_gpu else _AS_IT_IS:
        if a.dtype == out.dtype and alpha == 1.0 and not accumulate:
            torch.mm(a, b, out=out)
        elif a.dtype == out.dtype:
            torch.addmm(out, a, b, alpha=alpha, beta=float(accumulate), out=out)
        elif widens:
            _widening_mm(a, b, out, alpha, accumulate)
        else:
            product = torch.mm(a.float(), b.float()).mul_(alpha)
            out.copy_(out + product if accumulate else product)


def _widening_mm(a: Tensor, b: Tensor, out: Tensor, alpha: float, accumulate: bool) -> None:
    """`_mm` of 16-bit operands into fp32."""
    wide = out.dtype
    if not accumulate and alpha == 1.0:
        torch.mm(a, b, out_dtype=wide, out=out)
    elif WIDENING.addmm:
        torch.addmm(out, a, b, alpha=alpha, beta=float(accumulate), out_dtype=wide, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=wide, out=out)
        out.mul_(alpha)
    else:
        for rows in _slices(len(out), strip_rows(len(out), out.shape[1], out.device.type)):
            out[rows].add_(torch.mm(a[rows], b, out_dtype=wide), alpha=alpha)
