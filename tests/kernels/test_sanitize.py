"""A short walk through every kernel on the GPU's code path, for `make sanitize`.

Small odd shapes, splits of a row, 16-bit gradients, biases, transforms: enough for an out-of-bounds
access, a race between programs or a read of unwritten memory to show where a sanitizer executes
the kernels. Without one it is a smoke test.
"""

from __future__ import annotations

import pytest
import torch

from esr_kernels import JSD, KLMix, linear_divergence
from tests.kernels import cases


@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("divergence", ["forward_kl", KLMix(0.5, 0.5), JSD(0.3)], ids=str)
@pytest.mark.parametrize("make", [cases.random_pair, cases.odd_options], ids=lambda m: m.__name__)
def test_kernels_on_the_gpu_path(make, divergence, plan):
    case = make(torch.bfloat16)
    result = cases.ours(case, divergence, plan=plan, impl="triton")
    truth = cases.oracle(case, divergence)
    baseline = cases.plain(case, divergence, rounds_dz=True)
    cases.assert_as_good_as_plain(result, baseline, truth)


def test_a_row_split_over_programs():
    """5,000 classes are three blocks, and one token has a program for each."""
    case = cases._pair(1, 5003, (8, 8), (2.0, 2.0), torch.float32)
    result = cases.ours(case, "reverse_kl", plan="stash", impl="triton")
    cases.assert_as_good_as_plain(
        result, cases.plain(case, "reverse_kl"), cases.oracle(case, "reverse_kl")
    )


def test_no_tokens_launch_no_kernel():
    case = cases.random_pair(torch.bfloat16)
    out = linear_divergence(
        case.student_hidden[:0].requires_grad_(),
        case.student_weight,
        case.teacher_hidden[:0],
        case.teacher_weight,
        impl="triton",
    )
    assert out.loss.item() == 0
