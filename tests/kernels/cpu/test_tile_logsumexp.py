"""Tiles of logits in C, and draws from them, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import SampleKeys, SamplingParams, cpu, sample_from_logits
from esr_kernels.sampling import draw_torch
from tests.kernels.sampling.test_op import assert_same_draws

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")


def test_tiles_of_logits(monkeypatch):
    inf, nan = float("inf"), float("nan")
    tiled = 20 * torch.randn(70, 3, 256, generator=torch.Generator().manual_seed(0))
    tiled[0, 0], tiled[0, 1, 1:], tiled[1, 0, 7] = -inf, -inf, -inf
    tiled[2, 0, 9], tiled[2, 1], tiled[3, 0, 0] = nan, nan, inf
    maxima, log_sums = draw_torch.tile_sums(tiled)
    exact = tiled.double()
    top = exact.amax(-1)
    torch.testing.assert_close(maxima, top.float(), rtol=0, atol=0, equal_nan=True)
    below = torch.where(exact == -inf, -inf, exact - top[..., None]).exp().sum(-1).log()
    below[3, 0] = nan
    torch.testing.assert_close(log_sums.double(), below, rtol=0, atol=1e-6, equal_nan=True)
    monkeypatch.setattr(cpu, "supports_tiles", lambda logits: False)
    for ours, theirs in zip((maxima, log_sums), draw_torch.tile_sums(tiled), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, top_p=0.9)], ids=str)
def test_draws_without_a_compiler(params, monkeypatch):
    logits = 3 * torch.randn(200, 2048, generator=torch.Generator().manual_seed(0))
    keys = SampleKeys(0, torch.arange(200), 0)
    ours = sample_from_logits(logits, keys, params)
    monkeypatch.setattr(cpu, "supports_tiles", lambda logits: False)
    theirs = sample_from_logits(logits, keys, params)
    assert_same_draws(ours, theirs, atol=2e-6)
