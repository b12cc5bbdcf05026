"""The sampler draws from the distribution that it says, in the tails and between draws too.

Seeds are fixed; `FALSE_ALARM` is the rate at which a correct sampler would fail each test under
another seed. Rows with ids of their own and the same logits are independent draws.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esr_kernels import SampleKeys, SamplingParams, sample_from_logits
from esr_kernels.sampling.philox import gumbel, philox4x32, uniform
from esr_kernels.sampling.reference import kept_classes
from tests.kernels.cases import DEVICE
from tests.kernels.sampling_statistics import (
    FALSE_ALARM,
    assert_distribution,
    assert_independent,
    chi_square_p_value,
    poisson_range,
)

DRAWS = 20_000
LAST = 0xFFFFFFFF


def _logits(classes: int, std: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(classes, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * std


def _draw(
    logits: Tensor,
    params: SamplingParams | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 11,
    first: int = 0,
    step: int = 0,
    **options,
) -> Tensor:
    rows = torch.arange(first, first + draws, device=DEVICE)
    keys = SampleKeys(seed, rows, step)
    drawn = sample_from_logits(
        logits.expand(draws, -1), keys, params or SamplingParams(), **options
    )
    return drawn.tokens.cpu()


def _softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double().cpu() / temperature).softmax(0)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LAST,) * 4, (LAST, LAST), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, words):
    """The vectors that its authors publish (Random123, kat_vectors)."""
    drawn = philox4x32(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in drawn) == words


def test_both_tails_of_the_noise_keep_their_digits():
    words = torch.tensor([0, 1, 2, 1000, LAST // 2, LAST // 2 + 1, LAST - 1000, LAST - 1, LAST])
    high, low = (grid.flatten() for grid in torch.meshgrid(words, words, indexing="ij"))
    drawn = gumbel(high, low)
    for h, w, g in zip(high.tolist(), low.tolist(), drawn.tolist(), strict=True):
        numerator = h * 2**32 + w + 0.5  # Python's integers: the complement is exact
        near_one = (2**64 - (h * 2**32 + w)) - 0.5
        u = torch.tensor([numerator, near_one], dtype=torch.float64) * 2.0**-64
        exponential = -u[1].log() if u[0] > 0.5 else -torch.log1p(-u[0])
        truth = float(-exponential.log())
        assert abs(g - truth) < 4e-6 * max(1.0, abs(truth)), (h, w)
    assert drawn.max() > 45 and drawn.min() < -3.7


def test_the_level_in_a_tile_is_strictly_between_0_and_1():
    words = torch.tensor([0, LAST])
    low, high = uniform(words, words).tolist()
    assert low == 2.0**-53 and high == 1 - 2.0**-53


@pytest.mark.parametrize("classes", [1, 2, 100, 256, 257, 999, 4097])
def test_unfiltered_draws_have_the_softmax_distribution(classes):
    logits = _logits(classes)
    assert_distribution(_draw(logits), _softmax(logits))


def test_a_vocabulary_of_full_size():
    """Class by class where enough are expected, then by tile, and by place in a tile."""
    classes, tile = 151_936, 256
    p = _softmax(_logits(classes))
    drawn = _draw(_logits(classes), draws=10_000)
    assert_distribution(drawn, p)
    tiles = torch.nn.functional.pad(p, (0, -classes % tile)).view(-1, tile)
    assert_distribution(drawn // tile, tiles.sum(1))
    assert_distribution(drawn % tile, tiles.sum(0))


def test_a_wrong_distribution_is_noticed():
    """The test's own test: 5 % off in temperature, on as many draws."""
    logits = _logits(999)
    counts = torch.bincount(_draw(logits), minlength=999)
    assert chi_square_p_value(counts, _softmax(logits, 1.05)) < FALSE_ALARM
    assert chi_square_p_value(counts, _softmax(logits)) > FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(temperature):
    logits = _logits(300)
    drawn = _draw(logits, SamplingParams(temperature))
    assert_distribution(drawn, _softmax(logits, temperature))


def test_bias_scale_and_softcap_come_before_the_temperature():
    logits, bias = _logits(300, 4.0), _logits(300, 1.0, seed=1)
    drawn = _draw(logits, SamplingParams(0.7), bias=bias, softcap=3.0, logit_scale=-0.8)
    z = 3.0 * torch.tanh(-0.8 * (logits.double() + bias.double()) / 3.0) / 0.7
    assert_distribution(drawn, z.cpu().softmax(0))


def test_negative_logits_leave_nothing_to_the_padding_of_a_tile():
    logits = _logits(300) - 1000
    assert_distribution(_draw(logits), _softmax(logits))


def test_near_flat_logits_cover_the_vocabulary():
    """40 expected of each class: one is missing in 5e-15 of runs."""
    logits = _logits(1000, 0.05)
    counts = torch.bincount(_draw(logits, draws=40_000), minlength=1000)
    assert counts.min() > 0
    assert chi_square_p_value(counts, _softmax(logits)) > FALSE_ALARM


def test_the_tail_of_a_confident_tile_is_drawn():
    """One class at 0, then 255 at -17.4, 3e-8 each: less than half a step of fp32 below 1, so that
    adding them one by one to a sum in fp32 would never get past the first."""
    draws, part = 2_500_000, 500_000
    logits = torch.full((256,), -17.4, device=DEVICE)
    logits[0] = 0.0
    drawn = torch.cat([_draw(logits, draws=part, first=at) for at in range(0, draws, part)])
    low, high = poisson_range(draws * float(1 - _softmax(logits)[0]))
    assert low > 0 and low <= int((drawn > 0).sum()) <= high


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"step": 4}, {"step": 5}),
        ({"seed": 1}, {"seed": 2}),
        ({}, {"first": 1 << 32}),
        ({}, {"first": -(1 << 40)}),
    ],
    ids=str,
)
def test_draws_by_neighbouring_keys_are_independent(one, other):
    """Steps, seeds, and row ids that differ in their upper half alone."""
    logits = _logits(8, 1.0)
    assert_independent(_draw(logits, **one), _draw(logits, **other), _softmax(logits))


def test_neighbouring_rows_are_independent():
    logits = _logits(8, 1.0)
    drawn = _draw(logits, draws=2 * DRAWS)
    assert_independent(drawn[::2], drawn[1::2], _softmax(logits))


def test_tile_and_class_in_it_are_independent():
    """Eight tiles of equal mass, eight classes of equal mass in each."""
    logits = torch.full((8 * 256,), -torch.inf, device=DEVICE)
    logits.view(8, 8, 32)[:, :, 0] = 0.0
    drawn = _draw(logits) // 32
    assert_distribution(drawn, torch.full((64,), 1 / 64, dtype=torch.float64))


FILTERS = {
    "top_k": SamplingParams(top_k=7),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.05),
    "all": SamplingParams(0.8, top_k=20, top_p=0.9, min_p=0.03),
    "k beyond V": SamplingParams(top_k=10_000, top_p=0.99),
}


def _kept(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(distribution, kept classes) in fp64."""
    log_p = (logits.double().cpu() / params.temperature).log_softmax(0)[None]
    keep = kept_classes(log_p, params)
    return torch.where(keep, log_p, -torch.inf)[0].softmax(0), keep[0]


@pytest.mark.parametrize("classes", [40, 600])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_renormalise_what_they_keep(name, classes):
    logits = _logits(classes)
    p, keep = _kept(logits, FILTERS[name])
    assert 1 < int(keep.sum()) < classes
    drawn = _draw(logits, FILTERS[name])
    assert_distribution(drawn, p)
    counts = torch.bincount(drawn, minlength=classes)
    often = p * DRAWS > 25  # missing in 1e-11 of runs
    assert bool(often.any()) and bool((counts[often] > 0).all())
    assert not bool(counts[~keep].any())


def test_a_forced_token_is_always_drawn():
    logits = torch.full((700,), -torch.inf, device=DEVICE)
    logits[511] = -3.0
    assert bool((_draw(logits, draws=500) == 511).all())
