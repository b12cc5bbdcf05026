"""Our module in place of Liger's, number by number."""

from __future__ import annotations

import inspect

import pytest
import torch

from esr_kernels.integrations.liger import FusedLinearJSDLoss

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="pip install liger-kernel")


def _operands(classes=(50, 50), ignored=()):
    torch.manual_seed(0)
    tensors = [
        torch.randn(24, 16, requires_grad=True),
        torch.randn(classes[0], 16, requires_grad=True),
        torch.randn(24, 20),
        torch.randn(classes[1], 20),
    ]
    labels = torch.randint(0, min(classes), (24,))
    labels[list(ignored)] = -1
    return tensors, labels


def test_the_signatures_are_ligers():
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(liger.LigerFusedLinearJSDLoss, name)).parameters
        ours = inspect.signature(getattr(FusedLinearJSDLoss, name)).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_ligers(beta, weights, temperature):
    results = []
    for make in (liger.LigerFusedLinearJSDLoss, FusedLinearJSDLoss):
        tensors, labels = _operands(ignored=(0, 3, 17))
        biases = torch.linspace(-1, 1, 50).requires_grad_(), torch.linspace(1, -1, 50)
        loss_of = make(*weights, beta, -1, temperature, compiled=False, return_soft_hard_loss=True)
        loss, soft, hard = loss_of(*tensors, labels, *biases)
        (3.0 * loss).backward()
        gradients = tensors[0].grad, tensors[1].grad, biases[0].grad
        results.append([loss.detach(), soft, hard, *gradients])
        alone = make(*weights, beta, -1, temperature, compiled=False)(*tensors, labels, *biases)
        torch.testing.assert_close(alone.detach(), loss.detach())
    for theirs, ours in zip(*results, strict=True):
        assert theirs.any() and ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_no_label_left_is_a_loss_of_zero():
    tensors, labels = _operands(ignored=range(24))
    loss = FusedLinearJSDLoss(ignore_index=-1)(*tensors, labels)
    loss.backward()
    assert float(loss) == 0.0 and not tensors[0].grad.any()


def test_padding_of_the_teacher_has_no_probability():
    """Liger gives it the student's logit 0, which is mass; the loss of shared classes is ours."""
    tensors, labels = _operands((50, 52))
    found = FusedLinearJSDLoss(0.0, 1.0, beta=1.0)(*tensors, labels)
    tensors[3] = tensors[3][:50]
    equal = liger.LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=False)(*tensors, labels)
    torch.testing.assert_close(found, equal, rtol=5e-5, atol=1e-6)


def test_bad_settings_raise():
    with pytest.raises(ValueError, match="beta must be from 0 to 1"):
        FusedLinearJSDLoss(beta=1.5)
    tensors, labels = _operands()
    with pytest.raises(ValueError, match="temperature must be finite and above 0"):
        FusedLinearJSDLoss(temperature=0.0)(*tensors, labels)
