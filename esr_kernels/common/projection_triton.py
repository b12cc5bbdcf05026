"""A tile of logits straight from hidden states and a head, for kernels that fuse the projection,
and the keys of their block tables: kind of operands and architecture of the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton loads whole vectors where it sees that a row's length is a multiple of this.
_ALIGNMENT = 16


@triton.jit
def project(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    classes,
    hidden_stride,
    weight_stride,
    depth,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden[rows] @ weight[classes].T + bias[classes] in fp32, [BLOCK_T, BLOCK_V].

    `rows` and `classes` must exist; `bias_ptr` may be None. fp32 operands are multiplied in full
    fp32, not in TF32.
    """
    lane = tl.arange(0, BLOCK_D)
    hidden = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + lane[None, :]
    weight = weight_ptr + classes.to(tl.int64)[:, None] * weight_stride + lane[None, :]
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if bias_ptr is not None:
        # Here rather than in the epilogue, which has no registers to spare for it.
        logits += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    for start in range(0, depth, BLOCK_D):
        inside = (lane < depth - start)[None, :]
        h = tl.load(hidden + start, mask=inside, other=0.0)
        w = tl.load(weight + start, mask=inside, other=0.0)
        logits = tl.dot(h, w.T, logits, input_precision="ieee")
    return logits


def current_arch() -> str:
    """The GPU in use, as the block tables name it: itself, or the nearest smaller one."""
    if triton.knobs.runtime.interpret:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(int(target.arch) // 10, "sm_80")


def operand_kind(*weights: Tensor) -> str:
    """These heads, as the block tables name them: "16-bit", "fp32" or "unaligned"."""
    if any(weight.shape[1] % _ALIGNMENT for weight in weights):
        return "unaligned"
    return "16-bit" if all(weight.dtype.itemsize == 2 for weight in weights) else "fp32"
