"""What a draw depends on and what it returns; `test_distribution` tests its distribution."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from esr_kernels import Sample, SampleKeys, SamplingParams, sample_from_hidden, sample_from_logits
from esr_kernels.sampling import draw_torch, filters_torch
from esr_kernels.sampling.reference import kept_classes
from tests.kernels.cases import DEVICE

ROWS, CLASSES = 61, 1003
IMPL = "torch"
PARAMS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(0.3),
    "greedy": SamplingParams(0.0),
    "top_k": SamplingParams(1.2, top_k=9),
    "top_p": SamplingParams(top_p=0.9),
    "min_p": SamplingParams(min_p=0.02),
    "all": SamplingParams(0.8, 40, 0.95, 0.01),
}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _keys(rows: int = ROWS, step: int | Tensor = 3, seed: int = 5) -> SampleKeys:
    return SampleKeys(seed, 100 + torch.arange(rows, device=DEVICE), step)


def _sample(logits: Tensor, params: SamplingParams, keys: SampleKeys | None = None, **options):
    keys = keys or _keys(len(logits))
    return sample_from_logits(logits, keys, params, **{"impl": IMPL, **options})


def _equal(a: Sample, b: Sample) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same_draws(drawn: Sample, expected: Sample, atol: float = 8e-6) -> None:
    """The same tokens; fp32 errs by a few roundings of the logits, whose magnitude is 10."""
    assert torch.equal(drawn.tokens, expected.tokens)
    for value, exact in zip(drawn[1:], expected[1:], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact, rtol=0, atol=atol, equal_nan=True)


LOGITS = _normal(ROWS, CLASSES) * 3
ODD_OPTIONS = {
    "bias": _normal(CLASSES, seed=1),
    "softcap": 5.0,
    "logit_scale": -0.7,
    "num_classes": 998,
    "invalid": torch.tensor([0, 5, 997, 1002], device=DEVICE),
}


@pytest.mark.parametrize("options", [{}, ODD_OPTIONS], ids=["plain", "odd_options"])
@pytest.mark.parametrize("name", PARAMS)
def test_every_field_is_that_of_the_reference(name, options):
    drawn = _sample(LOGITS, PARAMS[name], **options)
    truth = _sample(LOGITS, PARAMS[name], impl="reference", **options)
    assert_same_draws(drawn, truth)
    spread = float(truth.logprob.std())
    assert spread > 0.1  # so that nothing constant would have passed


def test_log_kept_is_exactly_0_where_nothing_is_left_out():
    for params in (SamplingParams(), SamplingParams(0.5), SamplingParams(0.0)):
        assert not bool(_sample(LOGITS, params).log_kept.any())
    kept = _sample(LOGITS, PARAMS["top_p"]).log_kept
    assert bool((kept < 0).all()) and bool((kept.exp() >= 0.9 - 1e-6).all())


@pytest.mark.parametrize("name", PARAMS)
def test_batch_order_blocks_and_neighbours_change_no_bit(name, monkeypatch):
    params, keys = PARAMS[name], _keys()
    whole = _sample(LOGITS, params, keys)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = _sample(LOGITS[order], params, keys._replace(rows=keys.rows[order]))
    assert _equal(Sample(*(field[order] for field in whole)), shuffled)
    for row in (0, 17, ROWS - 1):
        part = slice(row, row + 1)
        alone = _sample(LOGITS[part], params, keys._replace(rows=keys.rows[part]))
        assert _equal(Sample(*(field[part] for field in whole)), alone)
    monkeypatch.setattr(draw_torch, "_BLOCK_ELEMENTS", 7 * 1024)
    monkeypatch.setattr(draw_torch, "_NOISE_ELEMENTS", 40)
    assert _equal(whole, _sample(LOGITS, params, keys))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_a_vocabulary_of_full_size(name):
    """593 tiles and a half, in blocks of four rows."""
    logits = _normal(6, 151_936) * 3
    drawn = _sample(logits, PARAMS[name])
    assert torch.equal(drawn.tokens, _sample(logits, PARAMS[name], impl="reference").tokens)


def test_the_number_of_threads_changes_no_bit():
    logits = _normal(3, 70_001) * 3
    alone = _sample(logits, PARAMS["all"])
    torch.set_num_threads(3)
    assert _equal(alone, _sample(logits, PARAMS["all"]))


def test_the_same_key_replays_and_another_does_not():
    flat = torch.zeros(ROWS, CLASSES, device=DEVICE)
    first = _sample(flat, SamplingParams())
    assert _equal(first, _sample(flat, SamplingParams()))
    for other in (_keys(step=4), _keys(seed=6), _keys(seed=5 + (1 << 32))):
        # 61 uniform draws from 1003 classes: 12 chance agreements in 1e-22 of runs.
        assert int((_sample(flat, SamplingParams(), other).tokens == first.tokens).sum()) < 12


def test_the_step_may_be_a_number_or_a_tensor_or_one_a_row():
    number = _sample(LOGITS, SamplingParams(), _keys(step=3))
    for step in (torch.tensor(3), torch.tensor([3]), torch.full((ROWS,), 3)):
        assert _equal(number, _sample(LOGITS, SamplingParams(), _keys(step=step.to(DEVICE))))
    mixed = torch.arange(ROWS, device=DEVICE)
    some = _sample(LOGITS, SamplingParams(), _keys(step=mixed))
    assert some.tokens[3] == number.tokens[3] and not torch.equal(some.tokens, number.tokens)


EACH_ROW = SamplingParams(
    torch.tensor([0.0, 0.5, 1.0, 1.5], device=DEVICE),
    torch.tensor([0, 3, 0, 50], device=DEVICE),
    torch.tensor([0.9, 1.0, 0.5, 0.8], device=DEVICE),
    torch.tensor([0.1, 0.0, 0.0, 0.01], device=DEVICE),
)


def test_parameters_of_each_row():
    together = _sample(LOGITS[:4], EACH_ROW)
    for row in range(4):
        here = slice(row, row + 1)
        params = SamplingParams(*(getattr(EACH_ROW, f.name)[row].item() for f in fields(EACH_ROW)))
        alone = _sample(LOGITS[here], params, SampleKeys(5, _keys().rows[here], 3))
        assert _equal(Sample(*(field[here] for field in together)), alone)


def test_greedy_is_the_first_class_of_the_largest_logit():
    tied = LOGITS.round()
    drawn = _sample(tied, SamplingParams(0.0))
    assert torch.equal(drawn.tokens, (tied == tied.amax(1, keepdim=True)).int().argmax(1))
    torch.testing.assert_close(
        drawn.logprob, tied.log_softmax(1).gather(1, drawn.tokens[:, None])[:, 0]
    )


@pytest.mark.parametrize(
    "params",
    [SamplingParams(top_k=1), SamplingParams(top_p=1e-6), SamplingParams(1e-6)],
    ids=["top_k=1", "top_p->0", "temperature->0"],
)
def test_limits_that_are_greedy(params):
    assert torch.equal(_sample(LOGITS, params).tokens, _sample(LOGITS, SamplingParams(0.0)).tokens)


def _kept(logits: Tensor, params: SamplingParams, draws: int = 3000) -> list[int]:
    """The classes ever drawn from one row of logits."""
    drawn = _sample(logits.expand(draws, -1), params, _keys(draws))
    return sorted(set(drawn.tokens.tolist()))


def test_ties_at_an_edge_are_kept_by_lowest_id():
    """Equal classes in three tiles; 3000 draws miss one of ten in 1e-136 of runs."""
    ids = [3, 200, 255, 256, 300, 511, 512, 600, 601, 699]
    logits = torch.full((700,), -20.0, device=DEVICE)
    logits[torch.tensor(ids, device=DEVICE)] = 2.0
    assert _kept(logits, SamplingParams(top_k=4)) == ids[:4]
    assert _kept(logits, SamplingParams(top_p=0.55)) == ids[:6]
    assert _kept(logits, SamplingParams(top_k=6, top_p=0.45)) == ids[:3]
    assert _kept(logits, SamplingParams(top_k=8, min_p=1.0)) == ids[:8]
    assert _kept(logits, SamplingParams(min_p=1.0)) == ids
    logits[700 - 100] = 3.0  # the edge is still at 2
    assert _kept(logits, SamplingParams(top_k=3)) == [3, 200, 600]


def test_signed_zeros_tie():
    logits = torch.full((300,), -20.0, device=DEVICE)
    logits[torch.tensor([7, 270], device=DEVICE)] = 0.0
    logits[torch.tensor([5, 9], device=DEVICE)] = -0.0
    assert _kept(logits, SamplingParams(top_k=3)) == [5, 7, 9]
    assert _kept(logits, SamplingParams(0.0)) == [5]


def test_top_p_keeps_the_class_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], device=DEVICE).log()
    assert _kept(logits, SamplingParams(top_p=0.49)) == [0]
    assert _kept(logits, SamplingParams(top_p=0.51)) == [0, 1]
    assert _kept(logits, SamplingParams(top_p=0.94)) == [0, 1, 2]
    # Of the mass of the three that top_k keeps: 0.5 / 0.95.
    assert _kept(logits, SamplingParams(top_k=3, top_p=0.52)) == [0]
    assert _kept(logits, SamplingParams(top_k=3, min_p=0.4)) == [0, 1]


@pytest.mark.parametrize("width", [1, 8, 300])
def test_a_nucleus_beyond_the_first_look_is_found(width, monkeypatch):
    """Flat rows among peaked ones: what is read first of a row does not reach their edge."""
    logits = LOGITS * torch.linspace(0.01, 2.0, ROWS, device=DEVICE)[:, None]
    whole = _sample(logits, PARAMS["top_p"])
    kept = kept_classes(logits[:1].double().log_softmax(1), PARAMS["top_p"])
    assert int(kept.sum()) > 800
    monkeypatch.setattr(filters_torch, "_WIDTH", width)
    assert _equal(whole, _sample(logits, PARAMS["top_p"]))


def test_every_likely_class_in_one_tile():
    logits = torch.full((5, 2000), -8.0, device=DEVICE)
    logits[:, 512:768] = _normal(5, 256)
    for name in ("top_k", "top_p", "all"):
        drawn = _sample(logits, PARAMS[name])
        assert torch.equal(drawn.tokens, _sample(logits, PARAMS[name], impl="reference").tokens)
        assert bool((drawn.tokens // 256 == 2).all())


@pytest.mark.parametrize("name", PARAMS)
def test_classes_that_do_not_exist_are_never_drawn(name):
    """Removed in each way there is, the likeliest among them; their mass counts nowhere."""
    alive = torch.ones(CLASSES, dtype=torch.bool, device=DEVICE)
    alive[::3] = False
    favoured = LOGITS.clone()
    favoured[:, ::3] += 30
    bias = torch.where(alive, 0.0, -torch.inf)
    removed = (
        _sample(favoured, PARAMS[name], invalid=~alive),
        _sample(favoured, PARAMS[name], invalid=(~alive).nonzero()[:, 0]),
        _sample(favoured, PARAMS[name], bias=bias),
        _sample(torch.where(alive, LOGITS, -torch.inf), PARAMS[name]),
    )
    assert bool(alive[removed[0].tokens].all())
    assert all(_equal(removed[0], other) for other in removed[1:])
    padded = torch.cat([LOGITS, LOGITS + 30], dim=1)
    assert _equal(_sample(padded, PARAMS[name], num_classes=CLASSES), _sample(LOGITS, PARAMS[name]))


@pytest.mark.parametrize("name", PARAMS)
def test_rows_without_a_distribution(name):
    logits = LOGITS[:7].clone()
    logits[0] = torch.nan
    logits[1, 700] = torch.nan
    logits[2] = -torch.inf
    logits[3, [5, 900]] = torch.inf
    logits[4, 3], logits[4, 900] = torch.inf, torch.nan
    drawn = _sample(logits, PARAMS[name])
    second = LOGITS[1].clone()
    second[700] = -9e9
    expected = [0, int(second.argmax()), 0, 5, 3]
    assert drawn.tokens[:5].tolist() == expected
    assert bool(drawn.logprob[:5].isnan().all()) and bool(drawn.log_kept[:5].isnan().all())
    assert not bool(drawn.lse[:5].isfinite().any()) and drawn.lse[2] == -torch.inf
    healthy = _sample(LOGITS[:7], PARAMS[name])
    assert _equal(Sample(*(f[5:] for f in drawn)), Sample(*(f[5:] for f in healthy)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_other_dtypes_are_read_exactly(dtype):
    logits = LOGITS.to(dtype)
    drawn = _sample(logits, SamplingParams())
    assert torch.equal(drawn.tokens, _sample(logits, SamplingParams(), impl="reference").tokens)
    assert drawn.logprob.dtype == torch.float32 and torch.equal(logits, LOGITS.to(dtype))


def test_logits_are_left_alone_and_may_be_a_view():
    before = LOGITS.clone()
    whole = _sample(LOGITS[:, ::2].contiguous(), PARAMS["all"], bias=_normal(502), softcap=3.0)
    view = _sample(LOGITS[:, ::2], PARAMS["all"], bias=_normal(502), softcap=3.0)
    assert _equal(whole, view) and torch.equal(LOGITS, before)


def test_empty_batches_and_a_single_class():
    for params in PARAMS.values():
        empty = _sample(LOGITS[:0], params)
        assert [len(field) for field in empty] == [0] * 4 and empty.tokens.dtype == torch.int64
        one = _sample(LOGITS[:, :1], params)
        assert not bool(one.tokens.any()) and not bool(one.logprob.any())


HIDDEN, WEIGHT = _normal(ROWS, 24, seed=2), _normal(CLASSES, 24, seed=3) * 0.5


@pytest.mark.parametrize("name", PARAMS)
def test_from_hidden_is_from_the_product(name):
    logits = (HIDDEN.double() @ WEIGHT.double().T).float()
    drawn = sample_from_hidden(HIDDEN, WEIGHT, _keys(), PARAMS[name], impl=IMPL, **ODD_OPTIONS)
    truth = _sample(logits, PARAMS[name], **ODD_OPTIONS)
    assert_same_draws(drawn, truth)


def test_rows_go_through_within_the_budget():
    whole = sample_from_hidden(HIDDEN, WEIGHT, _keys(), PARAMS["all"], impl=IMPL)
    budget = 4 * CLASSES * 9
    chunked = sample_from_hidden(
        HIDDEN, WEIGHT, _keys(), PARAMS["all"], impl=IMPL, memory_budget=budget
    )
    assert_same_draws(chunked, whole)
    with pytest.raises(ValueError, match="memory_budget must be at least 4012 bytes"):
        sample_from_hidden(HIDDEN, WEIGHT, _keys(), memory_budget=4011, impl=IMPL)


def test_logits_of_16_bit_operands_are_not_rounded():
    hidden, weight = HIDDEN.bfloat16(), WEIGHT.bfloat16()
    drawn = sample_from_hidden(hidden, weight, _keys(), impl=IMPL)
    truth = _sample((hidden.double() @ weight.double().T).float(), SamplingParams())
    torch.testing.assert_close(drawn.lse, truth.lse, rtol=0, atol=8e-6)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert _equal(drawn, sample_from_hidden(HIDDEN, WEIGHT, _keys(), impl=IMPL))


def test_no_graph_is_recorded():
    drawn = sample_from_hidden(HIDDEN, WEIGHT.clone().requires_grad_(), _keys(), impl=IMPL)
    assert not any(field.requires_grad for field in drawn)


def test_the_reference_keeps_the_digits_of_large_logits():
    for size in (1e4, 1e16, 1e20):
        logits = torch.full((1, 700), size, device=DEVICE)
        for impl in ("reference", "torch"):
            drawn = sample_from_logits(logits, _keys(1), SamplingParams(top_k=5), impl=impl)
            assert float(drawn.logprob) == pytest.approx(-math.log(700), rel=1e-5)
            assert float(drawn.log_kept) == pytest.approx(math.log(5 / 700), rel=1e-5)
