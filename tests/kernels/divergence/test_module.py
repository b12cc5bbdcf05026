"""`LinearDivergenceLoss` is `linear_divergence`."""

from __future__ import annotations

import inspect

import torch

from esr_kernels import JSD, LinearDivergenceLoss, linear_divergence
from tests.kernels import cases
from tests.kernels.cases import DEVICE, TOKENS

OPTIONS = {
    **cases.TRANSFORMS,
    "label_weight": 0.3,
    "plan": "recompute",
    "memory_budget": 18 << 20,
    "compact": False,
    "impl": "torch",
}


def test_it_is_the_function():
    case = cases.random_pair(torch.float32)
    generator = torch.Generator().manual_seed(2)
    tensors = {
        "token_weights": torch.rand(TOKENS, generator=generator).to(DEVICE),
        "labels": torch.randint(998, (TOKENS,), generator=generator).to(DEVICE),
        "student_bias": torch.randn(1003, generator=generator).to(DEVICE),
        "teacher_bias": torch.randn(1003, generator=generator).to(DEVICE),
    }
    hidden = case.student_hidden.requires_grad_()
    module = LinearDivergenceLoss(JSD(0.3), **OPTIONS)
    assert not list(module.parameters()) and not module.state_dict()
    ours = module(*case.tensors, **tensors)
    (gradient,) = torch.autograd.grad(ours.loss, hidden)
    expected = linear_divergence(*case.tensors, JSD(0.3), **OPTIONS, **tensors)
    (expected_gradient,) = torch.autograd.grad(expected.loss, hidden)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert torch.equal(gradient, expected_gradient)


def test_mapped_vocabularies_and_no_labels():
    case = cases.mapped_vocabularies(torch.float32)
    ours = LinearDivergenceLoss(label_weight=0.3)(*case.tensors, **case.options)
    assert torch.equal(ours.loss, linear_divergence(*case.tensors, **case.options).loss)


def test_it_has_every_option_of_the_function():
    every = {name for name, parameter in inspect.signature(linear_divergence).parameters.items()}
    documented = LinearDivergenceLoss.__doc__ + LinearDivergenceLoss.forward.__doc__
    for name in every - {"student_hidden", "student_weight", "teacher_hidden", "teacher_weight"}:
        assert name in documented


def test_its_repr_shows_what_was_chosen():
    assert repr(LinearDivergenceLoss("forward_kl", temperature=2.0)) == (
        "LinearDivergenceLoss(ForwardKL(forward=1.0, reverse=0.0), temperature=2.0)"
    )
