"""How many kernels a call launches on a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bench.walk import counts, empty, walk
from esr_kernels import linear_divergence, plan_linear_divergence

# Tokens, dims of the models, whether the head is trained: the two calls that docs/gpu.md is about.
SHAPES = ((8192, (1536, 3584), True), (6400, (1536, 2048), False))
CLASSES = 151_936


def _launches(
    tokens: int,
    dims: tuple[int, int],
    train_head: bool,
    labels: bool = False,
    weighted: bool = False,
) -> Counter[str]:
    """Of a forward and backward of reverse KL on bf16 operands."""

    def call() -> None:
        out = linear_divergence(
            empty(tokens, dims[0], grad=True),
            empty(CLASSES, dims[0], grad=train_head),
            empty(tokens, dims[1]),
            empty(CLASSES, dims[1]),
            token_weights=empty(tokens, dtype=torch.float32) if weighted else None,
            labels=empty(tokens, dtype=torch.int64) if labels else None,
            label_weight=0.1 if labels else 0.0,
        )
        out.loss.backward()

    found = counts(walk("sm_90", call))
    del found["ones_like"]  # the 1 that `backward` starts from
    return found


def _chunks(tokens: int, dims: tuple[int, int]) -> int:
    plan = plan_linear_divergence(tokens, CLASSES, *dims)
    assert plan.kind == "stash"
    return -(-tokens // plan.logit_chunk)


@pytest.mark.parametrize("shape", SHAPES, ids=["trainable head", "frozen head"])
def test_launches_of_a_stash(shape):
    launches = _launches(*shape)
    assert 10 < launches.total() <= 24, launches
    assert launches["row_statistics_kernel"] == launches["gradient_kernel"] > 0


@pytest.mark.parametrize("options", [{}, {"labels": True}, {"weighted": True}], ids=str)
def test_launches_of_a_chunk(options):
    """At most 9 more for each chunk of tokens: four products, three kernels, two to keep rows."""
    _, dims, head = SHAPES[0]
    short, long = (_launches(tokens, dims, head, **options) for tokens in (16_384, 32_768))
    chunks = _chunks(32_768, dims) - _chunks(16_384, dims)
    assert chunks >= 2 and 0 < long.total() - short.total() <= 9 * chunks


def test_labels_and_weights_take_few_launches():
    assert _launches(*SHAPES[0], labels=True, weighted=True).total() <= 36


def test_views_and_empty_tensors_launch_nothing():
    def call() -> None:
        x = torch.empty(4, 6, device="meta")
        x.t()[1:].view(5, 4).unbind()
        x.add_(1).sum()

    assert counts(walk("sm_90", call)) == {"add_": 1, "sum": 1}
