"""token_logprob: no worse than plain PyTorch against fp64, and what it promises besides."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from esr_kernels import token_logprob
from esr_kernels.common import matmul
from tests.kernels import cases, head_cases
from tests.kernels.cases import DEVICE
from tests.kernels.head_cases import HEADS, TOKENS

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_ALL = list(product(HEADS, [False, True], DTYPES))
_ON_CPU = list(product(HEADS, [False, True], DTYPES[:1]))
_ON_CPU += [(head, bool(i % 2), DTYPES[1 + i % 2]) for i, head in enumerate(HEADS)]


@pytest.mark.parametrize(
    ("head", "likely", "dtype", "impl"),
    [
        *((*combination, "torch") for combination in _ON_CPU),
        *((*combination, "triton") for combination in cases.thinned(_ALL, 7)),
    ],
    ids=str,
)
def test_no_worse_than_plain_pytorch(head, likely, dtype, impl):
    case = HEADS[head](dtype)
    three = head_cases.three(token_logprob, case, head_cases.tokens(case, likely), impl=impl)
    cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize("impl", IMPLS)
def test_tiles_of_classes_change_nothing(impl, monkeypatch):
    """A budget of 128 classes: no larger buffer of logits exists, and the result stays as good."""
    case = HEADS["odd_options"](torch.float32)
    budget = TOKENS * 128 * 4
    largest, project = [], matmul.project

    def spy(hidden, weight, out, *rest):
        largest.append(out.numel() * out.element_size())
        return project(hidden, weight, out, *rest)

    monkeypatch.setattr(matmul, "project", spy)
    tokens = head_cases.tokens(case)
    three = head_cases.three(token_logprob, case, tokens, impl=impl, memory_budget=budget)
    cases.assert_as_good_as_plain(*three)
    assert max(largest) <= budget and len(largest) == 2 * 8


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_one_class_and_nothing_but_ignored_rows(impl):
    hidden = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 4, device=DEVICE, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    ignored = torch.full((5,), -100, device=DEVICE)
    certain = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    for arguments in (
        (hidden[:0], weight, none),
        (hidden, weight, ignored),
        (hidden, weight[:1], certain),
    ):
        hidden.grad = weight.grad = None
        out = token_logprob(*arguments, impl=impl)
        assert out.logprob.shape == out.entropy.shape == arguments[2].shape
        assert out.logprob.eq(0).all() and out.entropy.eq(0).all()
        (out.logprob + out.entropy).sum().backward()
        assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_of_probability_0_has_minus_infinity(impl):
    hidden, weight, options = HEADS["minus_infinity"](torch.float32)
    tokens = torch.full((TOKENS,), 7, device=DEVICE)
    out = token_logprob(hidden, weight, tokens, impl=impl, **options)
    assert out.logprob.eq(-torch.inf).all() and out.entropy.isfinite().all()


def test_a_certain_token_keeps_the_digits_of_its_doubt():
    """log p of a token 25 logits ahead: -1e-10, where 1 - p in fp32 is 0."""
    weight = torch.tensor([[25.0], [0.0], [0.0]], device=DEVICE)
    out = token_logprob(torch.ones(1, 1, device=DEVICE), weight, torch.tensor([0], device=DEVICE))
    expected = -2 * torch.tensor(-25.0, device=DEVICE).exp()
    torch.testing.assert_close(out.logprob[0], expected, rtol=1e-6, atol=0)
