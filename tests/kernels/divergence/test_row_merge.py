"""The kernels that finish rows, against PyTorch's merge and cross-entropy, their specification."""

from __future__ import annotations

import pytest
import torch

from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import merge_triton, rows_torch, statistics
from esr_kernels.divergence.losses import JSD, ForwardKL, KLMix, ReverseKL
from esr_kernels.divergence.rows_triton import tile_gradient_, tile_pull_sums, tile_stats
from esr_kernels.divergence.statistics import IGNORED_LABEL, RowSpec, Tile, row_normalizers
from tests.kernels.cases import DEVICE

pytestmark = pytest.mark.kernels

_PLAIN = LogitTransform()
_CAPPED = LogitTransform(scale=0.5, softcap=8.0, temperature=0.7)


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _parts(n: int, count: int) -> torch.Tensor:
    """Statistics of `count` parts of n rows of large logits; a part of one row has no mass."""
    logits = (_randn(2, n, count * 8) * 4 + 1000).cpu()
    if count > 1:
        logits[:, 0, :8] = -torch.inf
    bias = torch.zeros(8)
    spec = RowSpec(ReverseKL(), _PLAIN, _PLAIN)
    tiles = [rows_torch.tile_stats(Tile(*x.clone(), bias), spec) for x in logits.split(8, 2)]
    parts = torch.cat(tiles, dim=1)
    parts[:, :, statistics.ARGMAX] += 8 * torch.arange(count)[:, None]
    return parts.to(DEVICE)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "divergence", [ReverseKL(), ForwardKL(), KLMix(0.3, 0.7), JSD(0.3)], ids=str
)
def test_merge_in_one_launch_is_the_merge_of_pytorch(divergence, count, labelled):
    n = 70  # more than one program, and not whole ones
    parts = _parts(n, count)
    labels = None
    if labelled:
        labels = torch.arange(n, device=DEVICE)
        labels[::3] = IGNORED_LABEL
    spec = RowSpec(divergence, _PLAIN, _PLAIN, label_weight=0.25)
    stats, *mixed = merge_triton.merge_rows(parts, labels, spec)
    expected, *expected_mixed = statistics.merge_rows(parts.double(), labels, spec)
    residuals = "student_residual", "teacher_residual"
    for name, ours, truth in zip(stats._fields, stats, expected, strict=True):
        if name not in residuals:
            torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=4e-6, msg=name)
    for model in ("student", "teacher"):
        exact = getattr(expected, f"{model}_lse")
        rounded, residual = getattr(stats, f"{model}_lse"), getattr(stats, f"{model}_residual")
        assert residual.abs().max() > 0
        error = (rounded.double() + residual.double() - exact).abs().max()
        assert error < 0.1 * (rounded.double() - exact).abs().max()
    if divergence.kl_weights is None:
        assert mixed == [None, None]
        return
    for ours, truth in zip(mixed, expected_mixed, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=4e-6)


def test_the_largest_logits_of_two_parts_agree_only_in_the_same_part():
    """Ranks number their classes from 0: the same number on two of them is two classes."""
    parts = _parts(3, 2)
    parts[:, :, statistics.ARGMAX] = 4.0
    parts[:, 0, statistics.MAX] = torch.tensor([9.0, 1.0], device=DEVICE)
    parts[:, 1, statistics.MAX] = torch.tensor([1.0, 9.0], device=DEVICE)
    parts[2, 1, statistics.MAX] = 1.0
    stats, *_ = merge_triton.merge_rows(parts, None, RowSpec(ReverseKL(), _PLAIN, _PLAIN))
    assert stats.agreement.tolist() == [0.0, 0.0, 1.0]


def test_rows_with_no_class_alive_have_no_distribution():
    parts = tile_stats(
        Tile(*torch.full((2, 3, 5), -torch.inf, device=DEVICE)),
        RowSpec(ReverseKL(), _PLAIN, _PLAIN),
    )
    stats, *_ = merge_triton.merge_rows(parts, None, RowSpec(ReverseKL(), _PLAIN, _PLAIN))
    assert stats.student_lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("depth", [24, 1100])
def test_cross_entropy_in_one_launch(depth, mapped, dtype):
    n, rows, classes = 9, 40, 33
    hidden = _randn(n, depth).to(dtype)
    weight = (_randn(rows, depth, seed=1) * depth**-0.5).to(dtype)
    bias = _randn(classes, seed=2)
    ids = _randn(rows).argsort()[:classes] if mapped else None
    labels = torch.arange(n, device=DEVICE)
    labels[3], labels[4], labels[5] = IGNORED_LABEL, classes, -1
    spec = RowSpec(ReverseKL(), _CAPPED, _PLAIN)
    shared = weight[:classes] if ids is None else weight[ids]
    z = hidden.double() @ shared.double().T + bias
    z = 8.0 * torch.tanh(0.5 * z / 8.0) / 0.7
    lse = z.logsumexp(1)
    head = weight if mapped else shared
    ours = merge_triton.cross_entropy(hidden, head, bias, ids, labels, lse.float(), spec)
    assert ours[3] == 0 and ours[4:6].isnan().all()
    known = [0, 1, 2, 6, 7, 8]
    expected = torch.nn.functional.cross_entropy(z[known], labels[known], reduction="none")
    torch.testing.assert_close(ours[known].double(), expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("divergence", [ForwardKL(), JSD(0.5)], ids=str)
def test_probabilities_among_large_logits_keep_their_digits(divergence):
    """A log-sum-exp of 10,000 is rounded to 1e-3: what that leaves out is a factor of each p."""
    n, classes = 5, 300
    s, t = 1e4 + _randn(2, n, classes)
    spec = RowSpec(divergence, _PLAIN, _PLAIN)
    stats, _, pull_sum = merge_triton.merge_rows(tile_stats(Tile(s, t), spec), None, spec)
    assert stats.student_residual.abs().max() > 1e-4
    if pull_sum is None:
        sums = tile_pull_sums(Tile(s, t), stats, spec)
        torch.testing.assert_close(sums[:, 2], torch.ones_like(sums[:, 2]), rtol=2e-6, atol=0)
        _, pull_sum = statistics.from_pull_sums(sums)
    dz = torch.empty_like(s)
    tile_gradient_(Tile(s, t), row_normalizers(stats, pull_sum), None, spec, dz)
    z = s.double().requires_grad_()
    p, q = z.softmax(1), t.double().softmax(1)
    log_ratio = q.log() - p.log()
    summand = q * log_ratio if divergence.kl_weights else divergence.summand(p, q, log_ratio)
    summand.sum().backward()
    assert (dz.double() - z.grad).norm() <= 2e-6 * z.grad.norm()
