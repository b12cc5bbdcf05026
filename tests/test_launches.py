"""How many kernels a call launches on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench.launches import SHAPES, Launches, counted, divergence_launches
from esr_kernels.divergence.plan import Problem
from esr_kernels.divergence.planner import make_plan


def _chunks(problem: Problem) -> int:
    plan = make_plan(problem)
    assert plan.kind == "stash"
    return -(-problem.tokens // plan.logit_chunk)


@pytest.mark.parametrize("problem", SHAPES, ids=["trainable head", "frozen head"])
def test_launches_of_a_stash(problem):
    launches = divergence_launches(problem)
    assert launches.total <= 24, launches.counts
    assert launches.counts["row_statistics_kernel"] == launches.counts["gradient_kernel"]


@pytest.mark.parametrize("options", [{}, {"labels": True}, {"weighted": True}], ids=str)
def test_launches_of_a_chunk(options):
    """At most 9 more for each chunk of tokens: four products, three kernels, two to keep rows."""
    problem = replace(SHAPES[0], tokens=16_384)
    longer = replace(problem, tokens=32_768)
    more = (
        divergence_launches(longer, **options).total - divergence_launches(problem, **options).total
    )
    chunks = _chunks(longer) - _chunks(problem)
    assert chunks >= 2 and more <= 9 * chunks


def test_labels_and_weights_take_few_launches():
    [problem, _] = SHAPES
    assert divergence_launches(problem, labels=True, weighted=True).total <= 36


def test_views_and_empty_tensors_launch_nothing():
    with counted() as launches:
        x = torch.empty(4, 6, device="meta")
        x.t()[1:].view(5, 4).unbind()
        assert launches.total == 0
        x.add_(1).sum()
    assert launches.counts == {"aten.add_": 1, "aten.sum": 1}
    assert isinstance(launches, Launches)
