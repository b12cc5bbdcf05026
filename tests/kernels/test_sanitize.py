"""What the numerics of `linear_divergence` leave out of the kernels' ways to run.

With `divergence.test_numerics`, enough for an out-of-bounds access, a race between programs
or a read of unwritten memory to show where a sanitizer executes the kernels (`make sanitize`).
"""

from __future__ import annotations

import pytest
import torch

from esr_kernels import linear_divergence
from tests.kernels import cases

pytestmark = pytest.mark.kernels


def test_a_row_split_over_programs():
    """5,003 classes are ten blocks, and one token has a program for each.

    Eight draws of a token, as one: how well a single number is known is luck, plain PyTorch's too.
    """
    draws = [cases._pair(1, 5003, (8, 8), (2.0, 2.0), torch.float32, seed=n) for n in range(8)]
    ours = [cases.ours(case, "reverse_kl", plan="stash", impl="triton") for case in draws]
    plain = [cases.plain(case, "reverse_kl") for case in draws]
    oracle = [cases.oracle(case, "reverse_kl") for case in draws]
    cases.assert_as_good_as_plain(*map(_as_one, (ours, plain, oracle)))


def _as_one(draws: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


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
