"""The arithmetic behind what `docs/linear_divergence.md` reports as tried and left out."""

from __future__ import annotations

import pytest
import torch

from bench.kl_cache import cached_step, direct_step, make_cache
from bench.peers import make_operands
from bench.real_pair import RealPair
from bench.teacher_precision import divergence_and_gradient, measure, to_bf16, to_fp8, to_int8
from bench.tile_sparsity import bound, gradient, tile_maxima
from bench.tile_sparsity import measure as measure_tiles


def _pair() -> RealPair:
    generator = torch.Generator().manual_seed(0)
    shapes = (20, 16), (301, 16), (20, 24), (301, 24)
    return RealPair(*(torch.randn(*shape, generator=generator) / 2 for shape in shapes))


def test_the_cache_gives_the_loss_and_gradient_of_the_teacher():
    x = make_operands(150, 16, 24, 301, beta=0.0, train_head=False)
    loss, gradient = cached_step(x, *make_cache(x))
    expected, direct = direct_step(x)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert direct.norm() > 1 and (gradient - direct).norm() <= 1e-5 * direct.norm()


@pytest.mark.parametrize(
    ("rounds", "least", "most"),
    [(to_bf16, 1e-3, 2**-8), (to_int8, 1e-3, 0.02), (to_fp8, 0.01, 2**-4)],
)
def test_rounding_errs_as_its_format_does(rounds, least, most):
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 3
    error = (rounds(x) - x).norm() / x.norm()
    assert least < error < most
    torch.testing.assert_close(rounds(-x), -rounds(x), rtol=0, atol=0)


def test_fewer_bits_err_more():
    rows = measure(_pair(), "forward_kl")
    assert rows["bf16"]["error dX"] < rows["int8 head"]["error dX"] < rows["fp8 head"]["error dX"]
    assert all(row["kl"] > 0 for row in rows.values())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_gradient_and_bound(divergence):
    pair = _pair()
    s = (pair.student_hidden @ pair.student_weight.T).requires_grad_()
    t = pair.teacher_hidden @ pair.teacher_weight.T
    kl, dz = divergence_and_gradient(s, t, divergence)
    (expected,) = torch.autograd.grad(kl.sum(), s)
    torch.testing.assert_close(dz, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gradient(s, t, divergence), expected, rtol=1e-4, atol=1e-7)
    tile = (8, 64)
    assert (tile_maxima(expected, tile) <= bound(s, t, divergence, tile) * (1 + 1e-5)).all()


def test_tiles_below_a_threshold_are_counted_and_cost_an_error():
    x = torch.zeros(5, 7)
    x[4, 6], x[0, 0] = -3.0, 1.0
    assert tile_maxima(x, (4, 4)).tolist() == [[1.0, 0.0], [0.0, 3.0]]
    rows = measure_tiles(_pair(), "reverse_kl", (1, 4), ordered=True)
    assert rows["2^-8"]["skipped"] > rows["1e-6"]["skipped"]
    assert rows["2^-8"]["known_before"] <= rows["2^-8"]["skipped"]
    assert rows["2^-8"]["error dX"] > rows["2^-16"]["error dX"]
