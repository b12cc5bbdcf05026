"""A filter that a user adds is a field and a floor, which every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from esr_kernels import SampleKeys, SamplingParams, sample_from_hidden, sample_from_logits
from esr_kernels.sampling.params import FLOORS, Floor
from tests.kernels.cases import DEVICE

ROWS, CLASSES, DEPTH = 6, 300, 16


@dataclass(frozen=True)
class WithCutoff(SamplingParams):
    """epsilon_cutoff: only classes of at least this probability."""

    epsilon_cutoff: float | Tensor = 0.0


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = Floor(
        0.0, lambda p: (p >= 0) & (p < 1), "from 0 to 1", lambda p, top, lse: lse + p.log()
    )
    monkeypatch.setitem(FLOORS, "epsilon_cutoff", floor)
    monkeypatch.setattr(SamplingParams, "epsilon_cutoff", 0.0, raising=False)


@pytest.mark.parametrize("others", [{}, {"top_k": 40, "min_p": 0.01}, {"top_p": 0.9}])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_a_new_filter(impl, others):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DEPTH, generator=generator).to(DEVICE)
    head = torch.randn(CLASSES, DEPTH, generator=generator).to(DEVICE)
    logits = hidden @ head.T
    keys = SampleKeys(1, torch.arange(ROWS, device=DEVICE), 0)
    # A value for each row: the first is above every probability, the last is off.
    values = torch.linspace(0.06, 0.0, ROWS, device=DEVICE)
    values[0] = 0.99
    params = WithCutoff(1.1, epsilon_cutoff=values, **others)
    wanted = sample_from_logits(logits, keys, params, impl="reference")
    for drawn in (
        sample_from_logits(logits, keys, params, impl=impl),
        sample_from_hidden(hidden, head, keys, params, impl=impl),
    ):
        assert torch.equal(drawn.tokens, wanted.tokens)
        torch.testing.assert_close(drawn.log_kept, wanted.log_kept, atol=2e-6, rtol=1e-5)
    p = (logits / 1.1).softmax(1).gather(1, wanted.tokens[:, None])[:, 0]
    assert bool((p >= values)[1:].all())
    assert int(wanted.tokens[0]) == int(logits[0].argmax())
    plain = sample_from_logits(logits, keys, SamplingParams(1.1, **others), impl=impl)
    assert bool((plain.log_kept - wanted.log_kept > 0.01).any())
    with pytest.raises(ValueError, match="epsilon_cutoff must be from 0 to 1, got 2"):
        WithCutoff(epsilon_cutoff=2)
