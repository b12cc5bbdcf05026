"""Splits the responses of a step into micro-batches, by number and by tokens.

Weights in the loss have the denominator of the whole step in them, so the gradients of
micro-batches add up to that of one batch, however it is split, over processes as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_train.config import OptimConfig
from esr_train.rollout import RolloutBatch


def micro_batches(
    batch: RolloutBatch,
    teacher_prompts: list[list[int]] | None,
    config: OptimConfig,
    rank: int = 0,
    ranks: int = 1,
    lockstep: bool = False,
) -> list[Tensor]:
    """Rows of `batch` for each forward and backward, int64; sorted by length, for little padding.

    Those of process `rank` of `ranks`, which get responses of about the same lengths. `lockstep`:
    as many as every other process gets, some with no rows.
    `teacher_prompts`, one a response where they differ from the student's, count where they are
    longer. With another tokenizer the teacher reads about as many tokens, which is not counted.
    """
    read = batch.prompts if teacher_prompts is None else teacher_prompts
    prompts = [max(map(len, both)) for both in zip(batch.prompts, read, strict=True)]
    widths, order = (batch.lengths + torch.tensor(prompts)).sort(stable=True)
    counts = [sizes(widths[other::ranks].tolist(), config) for other in range(ranks)]
    most = max(map(len, counts)) if lockstep else 0
    own = counts[rank] + [0] * (most - len(counts[rank]))
    return list(order[rank::ranks].split(own)) if own else []


def sizes(widths: list[int], config: OptimConfig) -> list[int]:
    """Numbers of rows in each micro-batch, for ascending widths."""
    if not widths:
        return []
    found, start = [], 0
    for row, width in enumerate(widths):
        rows = row + 1 - start
        full = config.micro_batch is not None and rows > config.micro_batch
        if rows > 1 and (full or (config.max_tokens and rows * width > config.max_tokens)):
            found.append(row - start)
            start = row
    return [*found, len(widths) - start]
