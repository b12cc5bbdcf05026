"""A tile of logits straight from hidden states and a head, for kernels that fuse the projection,
and the keys of their block tables: kind of operands and architecture of the GPU."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETS = triton.knobs.runtime.interpret  # reads the environment, at every look
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton loads whole vectors where it sees that a row's length is a multiple of this.
_ALIGNMENT = 16


@triton.jit
def project(operands, rows, classes, BLOCK_D: tl.constexpr):
    """hidden[rows] @ weight[classes].T + bias[classes] in fp32, a tile [rows, classes].

    `operands` is (hidden_ptr, weight_ptr, bias_ptr, hidden_stride, weight_stride, depth), bias_ptr
    None for none. `rows` and `classes` must exist. fp32 operands are multiplied in full fp32, not
    in TF32.
    """
    hidden_ptr, weight_ptr, bias_ptr, hidden_stride, weight_stride, depth = operands
    lane = tl.arange(0, BLOCK_D)
    hidden = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride + lane[None, :]
    weight = weight_ptr + classes.to(tl.int64)[:, None] * weight_stride + lane[None, :]
    logits = tl.zeros([rows.shape[0], classes.shape[0]], tl.float32)
    if bias_ptr is not None:
        # Not in the epilogue, which has no free registers.
        logits += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    for start in range(0, depth, BLOCK_D):
        inside = (lane < depth - start)[None, :]
        h = tl.load(hidden + start, mask=inside, other=0.0)
        w = tl.load(weight + start, mask=inside, other=0.0)
        logits = tl.dot(h, w.T, logits, input_precision="ieee")
    return logits


@triton.jit
def project_described(
    hidden, weight, bias_ptr, depth, row, classes, tile, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`project` from tensor descriptors of hidden [T, D] and weight [V, D], for `ROWS` rows
    from `row` on and `classes`, which follow one another from `tile` on. Where there is no such row
    or class, products are 0.

    Their loads are one instruction a block, which fills shared memory without the registers, and
    the instructions for addresses, that loads by pointers take.
    """
    logits = tl.zeros([ROWS, classes.shape[0]], tl.float32)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + classes).to(tl.float32)[None, :]
    for start in range(0, depth, BLOCK_D):
        h = hidden.load([row, start])
        w = weight.load([tile, start])
        logits = tl.dot(h, w.T, logits, input_precision="ieee")
    return logits


def check_fused(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise unless `project` takes the operands; `name` is a prefix of the arguments, or empty."""
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise TypeError(
            f"{name}hidden and {name}weight must share a dtype among bfloat16, float16 and float32 "
            f"for the fused kernel, got {hidden.dtype} and {weight.dtype}"
        )


def current_arch(like: Tensor) -> str:
    """The key of the GPU of `like` in the block tables: its own or the nearest smaller one."""
    if _INTERPRETS:
        return "sm_80"
    with torch.cuda.device_of(like):
        return _arch(triton.runtime.driver.active.get_current_device())


@functools.cache
def _arch(device: object) -> str:
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(int(target.arch) // 10, "sm_80")


def threads_of_a_warp(device: torch.device) -> int:
    """Threads that run in step on a GPU."""
    return 32 if _INTERPRETS else _threads(device, triton.runtime.driver.active)


@functools.cache
def _threads(device: torch.device, driver: object) -> int:
    with torch.cuda.device(device if device.type == "cuda" else -1):
        arch = _arch(triton.runtime.driver.active.get_current_device())
    return 64 if arch == "gfx942" else 32


def operand_kind(*weights: Tensor) -> str:
    """The key of these heads in the block tables: "16-bit", "fp32" or "unaligned"."""
    if any(weight.shape[1] % _ALIGNMENT for weight in weights):
        return "unaligned"
    return "16-bit" if all(weight.dtype.itemsize == 2 for weight in weights) else "fp32"
