"""Sampling fused into the projection draws what the logits' own pass draws."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from esr_kernels import sample_from_hidden
from esr_kernels.sampling import fused_triton
from esr_kernels.sampling.fused_triton import BLOCKS, Blocks, is_faster
from tests.kernels.cases import thinned
from tests.kernels.sampling.test_op import (
    HIDDEN,
    ODD_OPTIONS,
    PARAMS,
    WEIGHT,
    _keys,
    assert_same_draws,
)

pytestmark = pytest.mark.kernels

TINY = Blocks(16, 16, 4, 2)
ROWS = 19
UNFILTERED = ("plain", "cold", "greedy")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of rows, two of D."""
    monkeypatch.setattr(fused_triton, "BLOCKS", dict.fromkeys(BLOCKS, TINY))


def _both(name, dtype=torch.float32, rows=ROWS, keys=None, **options):
    keys = keys or _keys(rows)
    operands = HIDDEN[:rows].to(dtype), WEIGHT.to(dtype)
    return tuple(
        sample_from_hidden(*operands, keys, PARAMS[name], impl=impl, **options)
        for impl in ("triton", "torch")
    )


@pytest.mark.parametrize(
    ("name", "odd"), thinned(list(product(UNFILTERED, [False, True])), 5), ids=str
)
def test_the_tokens_of_the_logits(name, odd):
    fused, plain = _both(name, **(ODD_OPTIONS if odd else {}))
    assert_same_draws(fused, plain)


def test_16_bit_operands():
    """Their products are exact in fp32, so that the same tokens come out."""
    fused, plain = _both("plain", torch.bfloat16)
    assert_same_draws(fused, plain)


def test_a_row_alone_is_a_row_of_the_batch():
    keys = _keys(ROWS)
    whole, _ = _both("cold", keys=keys)
    operands = HIDDEN[18:19], WEIGHT
    alone = sample_from_hidden(
        *operands, keys._replace(rows=keys.rows[18:19]), PARAMS["cold"], impl="triton"
    )
    assert all(torch.equal(a[18:19], b) for a, b in zip(whole, alone, strict=True))


def test_a_hidden_state_of_nan_stays_in_its_row():
    hidden = HIDDEN[:3].clone()
    hidden[1, 5] = torch.nan
    keys = _keys(3)
    fused = sample_from_hidden(hidden, WEIGHT, keys, impl="triton")
    healthy, _ = _both("plain", rows=3)
    assert fused.tokens[1] == 0 and bool(fused.logprob[1].isnan())
    assert torch.equal(fused.tokens[::2], healthy.tokens[::2])


def test_which_batches_are_fused(monkeypatch):
    assert is_faster(1, 8192, "cpu") and is_faster(64, 4096, "cpu")
    assert not is_faster(65, 4096, "cpu")
    assert is_faster(128, 2048, "cpu") and not is_faster(129, 1024, "cpu")
    monkeypatch.setattr(fused_triton, "sample", None)
    with pytest.raises(TypeError, match="NoneType"):
        _both("plain", rows=1)
    _both("top_k", rows=1)  # filters need the logits
