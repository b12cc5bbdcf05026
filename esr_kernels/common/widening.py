"""Which products of 16-bit operands with an fp32 result PyTorch has, by its version.

    torch.mm(a, b, out_dtype=fp32)           on CUDA from 2.8 (pytorch#150812); on ROCm from 2.10,
                                             before which it raises (pytorch#161540, #162600)
    torch.addmm(c, a, b, out_dtype=fp32)     an fp32 `c` from 2.10; before, `c` must have the dtype
                                             of `a` and `b` (pytorch#167931)

Where one is missing `matmul` takes the next best: a product apart and an addition, or operands
converted to fp32.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Widening(NamedTuple):
    """Whether the result of 16-bit operands may be fp32, by function."""

    mm: bool
    addmm: bool  # and its first operand fp32


def widening(version: str, rocm: bool) -> Widening:
    """What the PyTorch of this version has, built for CUDA or for ROCm."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"version must start with two numbers, got {version!r}")
    release = int(found[1]), int(found[2])
    return Widening(mm=release >= ((2, 10) if rocm else (2, 8)), addmm=release >= (2, 10))
