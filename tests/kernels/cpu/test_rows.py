"""The row passes in C: against fp64, at their edges, and on several threads."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import (
    JSD,
    ForwardKL,
    Jeffreys,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    cpu,
)
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import rows_native, rows_torch
from esr_kernels.divergence.statistics import (
    RowSpec,
    Tile,
    from_pull_sums,
    merge_parts,
    mixed_kl,
    row_normalizers,
    with_labels,
)
from tests.kernels.cases import relative_error

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")

DIVERGENCES = [
    ForwardKL(),
    ReverseKL(),
    Jeffreys(),
    JSD(0.3),
    SkewForwardKL(0.2),
    SkewReverseKL(0.2),
    TotalVariation(),
]
TRANSFORMS = {
    "plain": LogitTransform(),
    "temperature": LogitTransform(scale=2.0, temperature=0.7),
    "softcap": LogitTransform(softcap=30.0, temperature=0.9),
}


def _name(value: object) -> str:
    return type(value).__name__


def _tile(rows: int, classes: int, spread: float, near: float | None = None) -> Tile:
    generator = torch.Generator().manual_seed(classes)
    s = spread * torch.randn(rows, classes, generator=generator)
    t = spread * torch.randn(rows, classes, generator=generator)
    if near is not None:
        t = s + near * torch.randn(rows, classes, generator=generator)
    bias = torch.randn(classes, generator=generator)
    labels = torch.randint(-1, classes, (rows,), generator=generator)
    labels[0] = -100
    return Tile(s, t, bias, bias.flip(0), labels)


def _as(tile: Tile, dtype: torch.dtype) -> Tile:
    """A copy in `dtype`: row passes overwrite their logits."""
    bias = tile.student_bias, tile.teacher_bias
    student, teacher = (None if b is None else b.to(dtype) for b in bias)
    s, t = tile.s.to(dtype, copy=True), tile.t.to(dtype, copy=True)
    return tile._replace(s=s, t=t, student_bias=student, teacher_bias=teacher)


def _all_passes(rows, tile: Tile, weight: torch.Tensor, spec: RowSpec, dtype: torch.dtype):
    """The results of all four passes of a module over a tile."""
    weight, at_once = weight.to(dtype), _as(tile, dtype)
    value, stats = rows.stash_rows_(at_once, weight, spec, at_once.s)
    merged = merge_parts(rows.tile_stats(_as(tile, dtype), spec))
    mix = spec.divergence.kl_weights
    if mix is None:
        later, pull_sum = from_pull_sums(rows.tile_pull_sums(_as(tile, dtype), merged, spec))
    else:
        later, pull_sum = mixed_kl(merged, *mix)
    tiled = _as(tile, dtype)
    known = row_normalizers(merged, with_labels(pull_sum, tile.labels, spec))
    rows.tile_gradient_(tiled, known, weight, spec, tiled.s)
    return {
        "value": value,
        "dz": at_once.s,
        "value of tiles": later,
        "dz of tiles": tiled.s,
        "student entropy": stats.student_entropy,
        "teacher entropy": stats.teacher_entropy,
        "student lse": stats.student_lse,
        "agreement": stats.agreement,
    }


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=_name)
@pytest.mark.parametrize("classes", [1, 7, 256, 1003])
def test_no_worse_than_the_pytorch_passes(classes, divergence, transform):
    spec = RowSpec(divergence, TRANSFORMS[transform], TRANSFORMS[transform], 0.3)
    for spread, near in ((1.0, None), (15.0, None), (3.0, 1e-2), (3.0, 0.0)):
        tile = _tile(37, classes, spread, near)
        weight = torch.rand(37, generator=torch.Generator().manual_seed(1))
        truth = _all_passes(rows_torch, tile, weight, spec, torch.float64)
        yardstick = _all_passes(rows_torch, tile, weight, spec, torch.float32)
        ours = _all_passes(rows_native, tile, weight, spec, torch.float32)
        for name, exact in truth.items():
            error, plain = (relative_error(x[name], exact) for x in (ours, yardstick))
            print(f"{name:>16}: compiled {error:.2e}  PyTorch {plain:.2e}")
            floor = 5e-7
            if "value" in name:  # nats below which fp32 logits of this spread say nothing
                floor = max(floor, 3e-7 * spread / max(float(exact.abs().mean()), 1e-30))
            assert error <= max(2 * plain, floor), name


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=_name)
@pytest.mark.parametrize("both", [False, True])
def test_a_class_removed_from_either_model_counts_nothing(both, divergence):
    spec = RowSpec(divergence, LogitTransform(), LogitTransform())
    gone = torch.zeros(600)
    gone[300:] = -torch.inf
    kept = gone if both else torch.zeros(600)
    tile = _tile(5, 600, 2.0)._replace(labels=None, student_bias=gone, teacher_bias=kept)
    ours = _all_passes(rows_native, tile, torch.ones(5), spec, torch.float32)
    truth = _all_passes(rows_torch, tile, torch.ones(5), spec, torch.float64)
    for name, exact in truth.items():
        finite = exact.isfinite()
        assert torch.equal(ours[name].isfinite(), finite), name
        assert relative_error(ours[name][finite], exact[finite]) < 2e-6, name
    if both:
        assert ours["dz"][:, 300:].eq(0).all() and ours["dz"][:, :300].ne(0).any()


def test_a_tile_without_a_class_alive_has_no_mass():
    tile = _tile(3, 40, 1.0)._replace(labels=None, student_bias=torch.full((40,), -torch.inf))
    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
    ours = rows_native.tile_stats(_as(tile, torch.float32), spec)
    expected = rows_torch.tile_stats(_as(tile, torch.float32), spec)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert ours[:, 0, 0].eq(-torch.inf).all() and ours[:, 0, 2].eq(-torch.inf).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=_name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_row_and_a_weight_of_zero_removes_it(bad, divergence):
    spec = RowSpec(divergence, LogitTransform(), LogitTransform())
    tile = _tile(4, 700, 1.0)._replace(labels=None, student_bias=None, teacher_bias=None)
    tile.s[2, 300] = bad
    clean = _as(tile, torch.float32)
    value, stats = rows_native.stash_rows_(clean, None, spec, clean.s)
    assert value[2].isnan() and stats.student_lse[2].isnan() == stats.student_entropy[2].isnan()
    others = torch.tensor([0, 1, 3])
    assert value[others].isfinite().all() and clean.s[others].isfinite().all()
    assert not clean.s[2].isfinite().all()
    weighted = _as(tile, torch.float32)
    rows_native.stash_rows_(weighted, torch.tensor([1.0, 1, 0, 1]), spec, weighted.s)
    assert weighted.s[2].eq(0).all() and torch.equal(weighted.s[others], clean.s[others])


def test_padded_rows_and_any_number_of_threads_give_the_same_bits():
    spec = RowSpec(JSD(), LogitTransform(), LogitTransform(), 0.5)
    tile = _tile(64, 2501, 2.0)
    dense, wide = _as(tile, torch.float32), torch.zeros(2, 64, 2560)
    wide[0, :, :2501], wide[1, :, :2501] = tile.s, tile.t
    padded = tile._replace(s=wide[0, :, :2501], t=wide[1, :, :2501])
    one = rows_native.stash_rows_(dense, None, spec, dense.s)[0]
    torch.set_num_threads(3)
    three = rows_native.stash_rows_(padded, None, spec, padded.s)[0]
    assert torch.equal(one, three) and torch.equal(dense.s, padded.s)
    assert wide[0, :, 2501:].eq(0).all()


def test_an_empty_tile_is_an_empty_answer():
    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
    tile = Tile(torch.empty(0, 9), torch.empty(0, 9))
    value, stats = rows_native.stash_rows_(tile, None, spec, tile.s)
    assert value.shape == stats.student_lse.shape == (0,)
