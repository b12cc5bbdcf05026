"""Projections with the classes in front: exact transposes, and products of the same values."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import cpu
from esr_kernels.common import matmul
from esr_kernels.cpu import products
from esr_kernels.cpu.library import library

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")


@pytest.mark.parametrize(
    ("tokens", "classes", "padding"),
    [(1, 1, 1), (5, 7, 0), (8, 8, 8), (67, 1000, 1), (8, 1024, 0), (67, 1024, 8)],
)
def test_transposed_logits_are_exact_and_stay_inside_their_rows(tokens, classes, padding):
    strip, out = torch.randn(classes, tokens), torch.full((tokens, classes + padding), 7.0)
    products.transpose_(library(), strip, out[:, :classes])
    assert torch.equal(out[:, :classes], strip.T)
    assert (out[:, classes:] == 7).all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("offset", [0, 3])
def test_projections_with_classes_in_front_are_products(compiled, offset, monkeypatch):
    if not compiled:
        monkeypatch.setattr(products, "library", lambda: None)
    monkeypatch.setattr(products, "is_faster", lambda: True)
    hidden, weight = torch.randn(9, 16), torch.randn(5 * products.STRIP_CLASSES + 13, 16)
    out = torch.full((9, weight.shape[0] + offset + 5), torch.nan)
    matmul.project(hidden, weight, out[:, offset : offset + weight.shape[0]])
    exact = (hidden.double() @ weight.double().T).float()
    torch.testing.assert_close(out[:, offset : offset + weight.shape[0]], exact)
    assert out[:, :offset].isnan().all() and out[:, offset + weight.shape[0] :].isnan().all()
