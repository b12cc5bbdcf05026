"""The exponential of ESR_GPU_EXP=1: as far off as a GPU's, and no further."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import conftest
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import rows_triton
from esr_kernels.divergence.losses import ReverseKL
from esr_kernels.divergence.statistics import LOG_SUM, RowSpec, Tile
from tests.kernels.cases import DEVICE


def test_it_errs_within_the_bound_of_the_instruction_and_of_the_product():
    x = -np.random.default_rng(0).exponential(8.0, 100_000).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    normal = exact > 2e-38
    error = np.abs(conftest.exp_of_a_gpu(x)[normal] / exact[normal] - 1)
    # The power's own error, its rounding, and that of x * log2 e as a share of the power.
    bound = 2.0**-22 + 2.0**-24 + 2.0**-23 * np.abs(x[normal])
    assert (error <= bound).all()
    assert error.max() > 2.0**-21


def test_its_ends():
    x = np.array([0.0, -np.inf, np.inf, np.nan, -90.0], dtype=np.float32)
    np.testing.assert_array_equal(conftest.exp_of_a_gpu(x), np.float32([1, 0, np.inf, np.nan, 0]))


@pytest.mark.kernels
@pytest.mark.skipif(conftest.HAS_GPU, reason="the GPU has its own")
def test_kernels_take_it_where_it_is_asked_for():
    """log(1 + exp x) of the kernel that sums exponentials is nearer to one than to the other."""
    x = -torch.linspace(0.1, 2.0, 64)
    z = torch.stack([torch.zeros_like(x), x], dim=1).to(DEVICE)
    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
    found = (
        rows_triton.tile_stats(Tile(z, z.clone()), spec)[:, 0, LOG_SUM][:, 0].cpu().double().numpy()
    )
    asked, other = (conftest.exp_of_a_gpu, np.exp)
    if not conftest.GPU_EXP:
        asked, other = other, asked
    errors = [np.linalg.norm(found - _log_1_plus(f, x.numpy())) for f in (asked, other)]
    assert errors[0] < 0.7 * errors[1]


def _log_1_plus(exp, x):
    exact = x if exp is conftest.exp_of_a_gpu else x.astype(np.float64)
    return np.log(1 + exp(exact).astype(np.float64))
