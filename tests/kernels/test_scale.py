"""The kernel that scales a gradient by a factor on the GPU."""

from __future__ import annotations

import pytest
import torch

from esr_kernels.common import scale_triton
from tests.kernels.cases import DEVICE

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.3, 0.0, -65536.0, float("nan"), float("inf")])
@pytest.mark.parametrize("programs", [1, 8])
def test_it_multiplies_in_fp32_and_rounds_once(dtype, factor, programs, monkeypatch):
    monkeypatch.setattr(scale_triton, "_BLOCK", 64)
    monkeypatch.setattr(scale_triton, "_PROGRAMS", 1)
    monkeypatch.setattr(scale_triton, "processors", lambda device: programs)
    x = torch.randn(7, 71, device=DEVICE).to(dtype)
    x[0, :3] = torch.tensor([torch.inf, torch.nan, 0.0])
    expected = (x.float() * factor).to(dtype)
    upstream = torch.tensor(factor, device=DEVICE)
    scale_triton.scale_(x, upstream)
    assert torch.equal(x.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(x.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3, 0.0])
def test_it_adds_to_another_tensor(dtype, factor, monkeypatch):
    monkeypatch.setattr(scale_triton, "_BLOCK", 64)
    monkeypatch.setattr(scale_triton, "processors", lambda device: 1)
    x, total = (torch.randn(9, 71, device=DEVICE) for _ in range(2))
    x = x.to(dtype)
    # A GPU fuses product and sum; the interpreter rounds both.
    expected, before = total.double() + x.double() * factor, x.clone()
    scale_triton.add_scaled_(total, x, torch.tensor(factor, device=DEVICE))
    assert float((total - expected).abs().max()) <= 2 * torch.finfo(torch.float32).eps * 4
    assert torch.equal(x, before)


def test_a_factor_of_another_dtype_and_an_empty_tensor():
    x = torch.ones(5, dtype=torch.bfloat16, device=DEVICE)
    scale_triton.scale_(x, torch.tensor(3, dtype=torch.float64, device=DEVICE))
    assert x.tolist() == [3.0] * 5
    scale_triton.scale_(x[:0], torch.tensor(3.0, device=DEVICE))
