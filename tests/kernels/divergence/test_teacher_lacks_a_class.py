"""A class that only the teacher has lost: forward KL is finite, and so is its gradient."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import KLMix, linear_divergence


@pytest.mark.parametrize("divergence", ["forward_kl", KLMix(1.0, 0.0)])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_forward_kl_is_finite(impl, plan, divergence):
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (torch.randn(n, 8, generator=generator) for n in (4, 10, 4, 10))
    bias = torch.zeros(10)
    bias[5] = -torch.inf
    h.requires_grad_()
    out = linear_divergence(h, w, th, tw, divergence, teacher_bias=bias, plan=plan, impl=impl)
    out.loss.backward()
    p = (h.detach().double() @ w.double().T).log_softmax(1)
    q = (th.double() @ tw.double().T + bias.double()).softmax(1)
    exact = torch.special.xlogy(q, q).sum() - (q * p).sum()
    assert float(out.loss) == pytest.approx(float(exact), rel=1e-5)
    torch.testing.assert_close(h.grad.double(), (p.exp() - q) @ w.double(), rtol=1e-4, atol=1e-5)
