"""linear_topk_divergence: bad input names the argument, what it was and what is allowed."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import linear_topk_divergence

_GOOD = {
    "student_hidden": torch.randn(3, 4),
    "student_weight": torch.randn(7, 4),
    "teacher_ids": torch.tensor([[0, 1], [6, -1], [-1, -1]]),
    "teacher_logprobs": torch.full((3, 2), 0.25).log(),
}
_BAD = {
    "id too large": (
        {"teacher_ids": torch.tensor([[0, 1], [7, 2], [3, 4]])},
        ValueError,
        "teacher_ids must be from 0 to 6, or -1 .* got 7 in row 1",
    ),
    "id negative": (
        {"teacher_ids": torch.tensor([[0, 1], [2, 3], [3, -2]])},
        ValueError,
        "teacher_ids.*got -2 in row 2",
    ),
    "id twice": (
        {"teacher_ids": torch.tensor([[0, 1], [2, 3], [4, 4]])},
        ValueError,
        "teacher_ids must not repeat an id in a row, got 4 twice in row 2",
    ),
    "no ids": (
        {"teacher_ids": torch.zeros(3, 0).long(), "teacher_logprobs": torch.zeros(3, 0)},
        ValueError,
        "teacher_ids must have at least one column",
    ),
    "ids of one dimension": (
        {"teacher_ids": torch.zeros(3).long()},
        ValueError,
        r"teacher_ids must have shape \[3, K\], got \[3\]",
    ),
    "int32": ({"teacher_ids": torch.zeros(3, 2).int()}, TypeError, "teacher_ids must be int64"),
    "shape": (
        {"teacher_logprobs": torch.zeros(3, 3)},
        ValueError,
        r"teacher_logprobs must have shape \[3, 2\].*got \[3, 3\]",
    ),
    "integers": (
        {"teacher_logprobs": torch.zeros(3, 2).long()},
        TypeError,
        "teacher_logprobs must be one of bfloat16.*got torch.int64",
    ),
    "logits": (
        {"teacher_logprobs": torch.ones(3, 2)},
        ValueError,
        "teacher_logprobs must be log-probabilities.*got 5.437 in row 0.*renormalise",
    ),
    "weights": (
        {"token_weights": torch.ones(2)},
        ValueError,
        r"token_weights must have shape \[3\], got \[2\]",
    ),
    "weights with gradient": (
        {"token_weights": torch.ones(3, requires_grad=True)},
        TypeError,
        "token_weights.*detach",
    ),
    "divergence": ({"divergence": "jsd"}, ValueError, "divergence must be one of.*'jsd'"),
    "tail": ({"tail": "drop"}, ValueError, "tail must be one of.*bucket.*'drop'"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of.*'avg'"),
    "hidden size": (
        {"student_weight": torch.randn(7, 3)},
        ValueError,
        "student_weight must have 4 columns as student_hidden has",
    ),
    "budget": ({"memory_budget": 1}, ValueError, "memory_budget of 1 bytes is too small"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input_names_the_argument(name):
    change, error, message = _BAD[name]
    with pytest.raises(error, match=message):
        linear_topk_divergence(**{**_GOOD, **change})
