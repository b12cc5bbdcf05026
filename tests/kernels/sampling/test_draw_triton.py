"""The sampler's Triton kernels draw what PyTorch draws, from the same words."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton
import triton.language as tl

from esr_kernels import SampleKeys, SamplingParams, sample_from_logits
from esr_kernels.sampling import draw_triton, filters_triton, tiles_triton
from esr_kernels.sampling.philox import gumbel, tile_words, uniform
from esr_kernels.sampling.philox_triton import gumbel as triton_gumbel
from esr_kernels.sampling.philox_triton import tile_words as triton_words
from esr_kernels.sampling.philox_triton import uniform as triton_uniform
from tests.kernels.cases import DEVICE, thinned
from tests.kernels.sampling.test_op import (
    EACH_ROW,
    LOGITS,
    ODD_OPTIONS,
    PARAMS,
    _keys,
    _normal,
    assert_same_draws,
)

pytestmark = pytest.mark.kernels

SOME = LOGITS[:4]


@triton.jit(do_not_specialize=["low", "high"])
def _words_into(rows_ptr, step_ptr, low, high, out_ptr, g_ptr, u_ptr, TILES: tl.constexpr):
    row = tl.program_id(0)
    tiles = tl.arange(0, TILES)
    words = triton_words(tiles, row, (rows_ptr, step_ptr, 0, low, high))
    at = row * TILES + tiles
    size = tl.num_programs(0) * TILES
    tl.store(out_ptr + at, words[0].to(tl.int64))
    tl.store(out_ptr + size + at, words[1].to(tl.int64))
    tl.store(out_ptr + 2 * size + at, words[2].to(tl.int64))
    tl.store(out_ptr + 3 * size + at, words[3].to(tl.int64))
    tl.store(g_ptr + at, triton_gumbel(words[0], words[1]))
    tl.store(u_ptr + at, triton_uniform(words[2], words[3]))


@pytest.mark.parametrize("seed", [0, 1, -1, (1 << 63) + 12345])
def test_words_agree_bit_for_bit(seed):
    rows = torch.tensor([0, 1, -7, 1 << 40, (1 << 32) - 1], device=DEVICE)
    keys = SampleKeys(seed, rows, (1 << 32) + (1 << 31) + 5)
    tiles = 16
    words = torch.empty(4, len(rows), tiles, dtype=torch.int64, device=DEVICE)
    g = torch.empty(len(rows), tiles, device=DEVICE)
    u = torch.empty(len(rows), tiles, dtype=torch.float64, device=DEVICE)
    low, high = (draw_triton._signed(word) for word in draw_triton.key_words(seed))
    step = torch.tensor([keys.step], device=DEVICE)
    _words_into[(len(rows),)](rows, step, low, high, words, g, u, TILES=tiles)
    expected = tile_words(keys, tiles)
    assert torch.equal(words, torch.stack(expected))
    assert torch.equal(u, uniform(*expected[2:]))
    # The logarithms may round differently.
    torch.testing.assert_close(g, gumbel(*expected[:2]), rtol=2e-6, atol=2e-6)


def _agree(logits, params, keys=None, **options) -> None:
    keys = keys or _keys(len(logits))
    drawn = sample_from_logits(logits, keys, params, impl="triton", **options)
    expected = sample_from_logits(logits, keys, params, impl="torch", **options)
    assert_same_draws(drawn, expected)


@pytest.mark.parametrize(("name", "odd"), thinned(list(product(PARAMS, [False, True])), 3), ids=str)
def test_the_tokens_of_pytorch(name, odd):
    _agree(SOME, PARAMS[name], **(ODD_OPTIONS if odd else {}))


def test_parameters_of_each_row():
    _agree(SOME, EACH_ROW, _keys(4, step=torch.arange(4, device=DEVICE)))


@pytest.mark.parametrize("name", ["plain", "greedy", "top_k"])
def test_rows_without_a_distribution(name):
    logits = SOME.clone()
    logits[0] = torch.nan
    logits[1, 700] = torch.nan
    logits[2] = -torch.inf
    logits[3, [5, 900]] = torch.inf
    _agree(logits, PARAMS[name])


_EDGES = [
    SamplingParams(top_k=4),
    SamplingParams(top_p=0.55),
    SamplingParams(top_k=6, top_p=0.45),
    SamplingParams(top_k=8, min_p=1.0),
    SamplingParams(min_p=1.0),
]


@pytest.mark.parametrize("params", thinned(_EDGES, 2), ids=str)
def test_ties_at_an_edge(params):
    """Equal classes in three tiles, zeros of both signs; every row another draw."""
    logits = torch.full((4, 700), -20.0, device=DEVICE)
    ids = torch.tensor([3, 200, 255, 256, 300, 511, 512, 600, 601, 699], device=DEVICE)
    logits[:, ids] = 0.0
    logits[:, ids[::2]] = -0.0
    _agree(logits, params)


def test_few_candidates_a_flat_nucleus_and_one_tile():
    _agree(SOME, SamplingParams(top_k=3, top_p=0.9))  # four maxima bound the third logit
    _agree(_normal(1, 5000) * 0.01, SamplingParams(top_p=0.9))
    _agree(_normal(2, 1) * 4, SamplingParams(0.5, 3, 0.9, 0.1))
    _agree(_normal(2, 200).bfloat16(), SamplingParams(0.5, 3, 0.9, 0.1))


def test_blocks_and_batch_change_no_bit(monkeypatch):
    keys = _keys(4)
    whole = sample_from_logits(SOME, keys, PARAMS["all"], impl="triton")
    monkeypatch.setattr(tiles_triton, "STATISTICS_BLOCK", (2, 4))
    monkeypatch.setattr(filters_triton, "CANDIDATES_BLOCK", (128, 4))
    monkeypatch.setattr(filters_triton, "CUTOFF_BLOCK", (256, 4))
    monkeypatch.setattr(filters_triton, "CAPACITY", 32)  # too few: read the row
    monkeypatch.setattr(draw_triton, "DRAW_BLOCK", (2, 32, 4))
    order = torch.tensor([3, 1], device=DEVICE)
    part = sample_from_logits(
        SOME[order], keys._replace(rows=keys.rows[order]), PARAMS["all"], impl="triton"
    )
    assert torch.equal(part.tokens, whole.tokens[order])
    torch.testing.assert_close(part.logprob, whole.logprob[order], rtol=0, atol=1e-6)


def test_no_rows_launch_no_kernel():
    assert len(sample_from_logits(SOME[:0], _keys(0), impl="triton").tokens) == 0


def test_parameters_need_not_lie_side_by_side():
    """Strided and expanded ones, as a table of settings or one value for all rows would be."""
    logits = _normal(6, 300, seed=2)
    table = torch.tensor([[0.7, 0.9], [1.0, 0.5], [1.3, 0.8]], device=DEVICE).repeat(2, 1)
    params = SamplingParams(
        table[:, 0],
        top_k=torch.tensor(50, device=DEVICE).expand(6),
        top_p=table[:, 1],
        min_p=torch.tensor(0.01, device=DEVICE).expand(6),
    )
    bias = _normal(1, 600, seed=3)[0, ::2]
    invalid = (_normal(1, 600, seed=4)[0] > 1.5)[::2]
    _agree(logits, params, bias=bias, invalid=invalid, softcap=30)


@pytest.mark.parametrize("seed", [0, -1, (1 << 40) + 12345])
def test_a_seed_in_memory_is_the_seed(seed):
    """A CUDA graph reads it at every replay, so that a captured step serves another seed."""
    logits = SOME.to(DEVICE)
    rows = torch.arange(len(logits), device=DEVICE)
    in_memory = torch.tensor([seed], device=DEVICE)
    for impl in ("triton", "torch"):
        expected = sample_from_logits(logits, SampleKeys(seed, rows, 3), impl=impl)
        other = sample_from_logits(logits, SampleKeys(seed + 1, rows, 3), impl=impl)
        found = sample_from_logits(logits, SampleKeys(in_memory, rows, 3), impl=impl)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.logprob, expected.logprob)
        assert not torch.equal(other.tokens, expected.tokens)
