"""Launch shapes of the kernels over one head that the numerics of the two ops leave out.

Three tiles of classes, rows split over programs, ids at the edges of a tile, padded ids, 16-bit
gradients: in `make sanitize`, an access out of bounds or a race between programs shows here.
"""

from __future__ import annotations

import pytest
import torch

from esr_kernels import linear_topk_divergence, token_logprob
from esr_kernels.scoring import reference
from tests.kernels import cases, head_cases
from tests.kernels.cases import DEVICE

pytestmark = pytest.mark.kernels

# Three tiles of 384 classes, at 4 bytes a logit and 2 a gradient; ids at their edges, -1 for none.
BUDGET = head_cases.TOKENS * 384 * 6
IDS = torch.tensor([0, 383, 384, 767, 768, 997, -1, 5, 300, -1, 600, 601], device=DEVICE)


def _check(op, spec, case, arguments, backward, **how):
    """Compare `op` with `spec`, the reference; `how` goes to `op` alone."""
    result = head_cases.run(op, case, arguments, backward, impl="triton", **how)
    baseline = head_cases.run(
        lambda *a, **k: spec(*a, dtype=torch.float32, **k),
        case,
        arguments,
        backward,
        rounds_dz=True,
    )
    truth = head_cases.run(spec, case, arguments, backward, torch.float64)
    cases.assert_as_good_as_plain(result, baseline, truth)


@pytest.mark.parametrize("make", ["random_head", "odd_options"])
def test_token_logprob_on_the_gpu_path(make):
    case = head_cases.HEADS[make](torch.bfloat16)
    tokens = IDS.repeat(2)[: head_cases.TOKENS]
    tokens = torch.where(tokens < 0, -100, tokens)
    _check(
        token_logprob,
        reference.token_logprob,
        case,
        (tokens,),
        lambda out: (out["logprob"] - 0.3 * out["entropy"]).sum(),
        memory_budget=BUDGET,
    )


@pytest.mark.parametrize("make", ["random_head", "odd_options"])
def test_linear_topk_divergence_on_the_gpu_path(make):
    case = head_cases.HEADS[make](torch.bfloat16)
    ids = torch.stack([IDS.roll(row) for row in range(head_cases.TOKENS)])
    logprobs = head_cases._normal(*ids.shape, seed=3).to(DEVICE).log_softmax(1) - 0.2
    _check(
        linear_topk_divergence,
        reference.linear_topk_divergence,
        case,
        (ids, logprobs),
        lambda out: out["loss"],
        memory_budget=BUDGET,
    )


def test_a_row_split_over_programs():
    """5,003 classes are five blocks, with a program for each where there is one token."""
    case = head_cases.head(torch.float32, 2.0, tokens=1, classes=5003)
    tokens = torch.tensor([2047], device=DEVICE)
    _check(
        token_logprob, reference.token_logprob, case, (tokens,), lambda out: out["logprob"].sum()
    )


def test_a_gradient_of_the_listed_classes_alone():
    """tail="renormalise" has no gradient for unlisted classes: one kernel and no row pass."""
    case = head_cases.random_head(torch.bfloat16)
    ids = IDS[IDS >= 0].expand(head_cases.TOKENS, -1)
    logprobs = head_cases._normal(*ids.shape, seed=3).to(DEVICE)

    def op(*arguments, **options):
        return linear_topk_divergence(*arguments, tail="renormalise", **options)

    def spec(*arguments, **options):
        return reference.linear_topk_divergence(*arguments, tail="renormalise", **options)

    _check(op, spec, case, (ids, logprobs), lambda out: out["loss"])
