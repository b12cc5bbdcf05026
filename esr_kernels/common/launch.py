"""Launches of Triton kernels: on which device, with which options, and how many programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# At least four waves on a large GPU, whose last is then a small share: an MI300X has room for 2,128
# programs of 4 warps and 70 registers at once, an H100 for 1,320.
_WANTED_PROGRAMS = 9216


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor) -> Callable[..., None]:
    """`kernel[grid]` on the device of `like`.

    Triton launches on the current device, where tensors of another are out of reach. Products and
    sums are fused, which is Triton's default now and not in 3.10: the bits of a result must not
    change with it.
    """
    run = kernel[grid]

    def launched(*args: Any, **kwargs: Any) -> None:
        with torch.cuda.device_of(like):
            run(*args, enable_fp_fusion=True, **kwargs)

    return launched


def split_columns(rows: int, columns: int, block: int) -> tuple[int, int]:
    """(programs for each row, columns of each program), where a program takes whole blocks.

    With many rows there is one program a row. With few, each row is split until the launch has
    `_WANTED_PROGRAMS` programs, or a program for every block.
    """
    blocks = -(-columns // block)
    splits = min(blocks, -(-_WANTED_PROGRAMS // max(rows, 1)))
    width = -(-blocks // splits) * block
    return -(-columns // width), width
