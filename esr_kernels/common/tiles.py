"""Tiles of classes: how wide they may be within a budget, and their logits in reused buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from esr_kernels.common.arguments import check_memory_budget
from esr_kernels.common.workspace import borrow, default_memory_budget, row_stride

# Below this many classes a tile's matrix product runs far below the rate of a large one.
_TILE_STEP = 64
# The CPU's row passes keep two or three buffers of a block's size in the last-level cache. Four
# rows of a Qwen vocabulary are enough for operations on [rows, V] to outweigh those on [rows].
_BLOCK_ELEMENTS = 640_000


def tile_width(
    tokens: int, classes: int, element_bytes: int, device: torch.device, memory_budget: int | None
) -> int:
    """Classes whose logits exist at once: as many as fit the budget at `element_bytes` a logit.

    Raises:
        ValueError: the smallest tile takes more than the given budget.
    """
    check_memory_budget(memory_budget)
    budget = memory_budget or default_memory_budget(device)
    column = max(tokens, 1) * element_bytes
    if budget // column >= row_stride(classes):
        return classes
    fitting = budget // column // _TILE_STEP * _TILE_STEP
    if fitting == 0:
        if memory_budget is not None:
            smallest = column * min(_TILE_STEP, row_stride(classes))
            raise ValueError(
                f"memory_budget of {memory_budget} bytes is too small: "
                f"the smallest tile of logits needs {smallest} bytes"
            )
        fitting = _TILE_STEP
    tiles = math.ceil(classes / fitting)
    return math.ceil(classes / tiles / _TILE_STEP) * _TILE_STEP


def class_tiles(classes: int, width: int) -> Iterator[slice]:
    """All classes in tiles of at most `width`."""
    for start in range(0, classes, width):
        yield slice(start, min(start + width, classes))


def row_blocks(rows: int, classes: int) -> Iterator[slice]:
    """All rows in blocks of logits that stay in the cache of a CPU."""
    height = max(1, _BLOCK_ELEMENTS // max(classes, 1))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


class TileBuffer:
    """Memory that holds the logits of one tile of classes after another.

    The memory is flat, so that a last tile that is narrower has padded rows of its own width. It is
    borrowed: valid until the next `borrow` of `name` in this thread.
    """

    def __init__(
        self, name: str, tokens: int, widest: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._tokens = tokens
        self._flat = borrow(name, (tokens * row_stride(widest),), device, dtype)

    def rows(self, width: int) -> Tensor:
        """Uninitialised logits [tokens, width] of a tile of at most `widest` classes."""
        stride = row_stride(width)
        return self._flat[: self._tokens * stride].view(self._tokens, stride)[:, :width]
