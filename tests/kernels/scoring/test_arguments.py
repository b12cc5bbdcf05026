"""What the ops on one head refuse: by the argument's name, what it was and what is allowed."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import linear_topk_divergence, token_logprob

_FP64 = {"hidden": torch.ones(4, 3).double(), "weight": torch.ones(7, 3).double()}
# Of the head, which both ops check with one function.
_OF_TOKENS = [
    ({"tokens": torch.tensor([0, 7, 1, 2])}, "tokens must be from 0 to 6, .* got 7 at position 1"),
    ({"tokens": torch.tensor([0, 1, 2, -1])}, "or -100 to leave a position out, got -1 at pos"),
    ({"num_classes": 6}, "tokens must be from 0 to 5.*got 6"),
    ({"tokens": torch.tensor([0, 1])}, r"tokens.*shape \[4\], got \[2\]"),
    ({"tokens": torch.zeros(4).int()}, "tokens must be int64, got torch.int32"),
    ({"tokens": [0, 1, 2, 3]}, "tokens must be a torch.Tensor, got list"),
    ({"weight": torch.randn(7, 4)}, "weight must have 3 columns"),
    ({"hidden": torch.randn(2, 2, 3)}, "hidden must have 2 dimensions"),
    ({"weight": torch.randn(7, 3).bfloat16()}, "same dtype outside of autocast"),
    ({"hidden": torch.ones(4, 3).long()}, "hidden must be one of.*int64"),
    ({"num_classes": 0}, "num_classes must be an integer from 1 to 7"),
    ({"num_classes": 8}, "num_classes.*rows of weight, got 8"),
    ({"weight": torch.randn(0, 3)}, "weight must have at least one row"),
    ({"bias": torch.ones(6)}, r"bias must have shape \[7\]"),
    ({"temperature": 0.0}, "temperature must be finite and above 0"),
    ({"softcap": -1.0}, "softcap must be None or finite and above 0, got -1.0"),
    ({"logit_scale": 0.0}, "logit_scale must be finite and not 0, got 0.0"),
    ({"impl": "cuda"}, "impl must be one of.*'cuda'"),
    ({"memory_budget": 10}, "memory_budget of 10 bytes is too small.*384"),
    ({"memory_budget": 0}, "memory_budget must be a positive whole"),
    ({**_FP64, "impl": "triton"}, "impl='triton' computes in fp32"),
]


@pytest.mark.parametrize(("change", "message"), _OF_TOKENS, ids=[m for _, m in _OF_TOKENS])
def test_token_logprob_names_the_argument(change, message):
    good = {"hidden": torch.randn(4, 3), "weight": torch.randn(7, 3)}
    good["tokens"] = torch.tensor([0, 1, 6, -100])
    with pytest.raises((ValueError, TypeError), match=message):
        token_logprob(**{**good, **change})


_IDS, _LOGPROBS = "teacher_ids", "teacher_logprobs"
_OF_TEACHERS = [
    ({_IDS: torch.tensor([[0, 1], [7, 2], [3, 4]])}, "ids must be from 0 to 6, .* got 7 in row 1"),
    ({_IDS: torch.tensor([[0, 1], [2, 3], [3, -2]])}, "teacher_ids.*or -1 .* got -2 in row 2"),
    ({_IDS: torch.tensor([[0, 1], [2, 3], [4, 4]])}, "must not repeat .* got 4 twice in row 2"),
    ({_IDS: torch.zeros(3, 0).long(), _LOGPROBS: torch.zeros(3, 0)}, "ids must have at least one"),
    ({_IDS: torch.zeros(3).long()}, r"teacher_ids must have shape \[3, K\], got \[3\]"),
    ({_IDS: torch.zeros(3, 2).int()}, "teacher_ids must be int64"),
    ({_LOGPROBS: torch.zeros(3, 3)}, r"teacher_logprobs must have shape \[3, 2\].*\[3, 3\]"),
    ({_LOGPROBS: torch.zeros(3, 2).long()}, "logprobs must be one of bfloat16.*torch.int64"),
    ({_LOGPROBS: torch.ones(3, 2)}, "be log-probabilities.*5.437 in row 0.*renormalise"),
    ({"token_weights": torch.ones(2)}, r"token_weights must have shape \[3\], got \[2\]"),
    ({"token_weights": torch.ones(3, requires_grad=True)}, "token_weights.*detach"),
    ({"divergence": "jsd"}, "divergence must be one of.*'jsd'"),
    ({"tail": "drop"}, "tail must be one of.*bucket.*'drop'"),
    ({"reduction": "avg"}, "reduction must be one of.*'avg'"),
    ({"student_weight": torch.randn(7, 3)}, "student_weight must have 4 columns as student_hid"),
    ({"memory_budget": 1}, "memory_budget of 1 bytes is too small"),
]


@pytest.mark.parametrize(("change", "message"), _OF_TEACHERS, ids=[m for _, m in _OF_TEACHERS])
def test_linear_topk_divergence_names_the_argument(change, message):
    good = {"student_hidden": torch.randn(3, 4), "student_weight": torch.randn(7, 4)}
    good[_IDS] = torch.tensor([[0, 1], [6, -1], [-1, -1]])
    good[_LOGPROBS] = torch.full((3, 2), 0.25).log()
    with pytest.raises((ValueError, TypeError), match=message):
        linear_topk_divergence(**{**good, **change})
