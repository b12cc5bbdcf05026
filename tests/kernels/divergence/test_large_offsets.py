"""Logits beyond 2**31 elements: rows of a sparse file, so far apart that int32 offsets would wrap.

Only the pages that are touched exist: a few hundred KiB of 8 GiB.
"""

from __future__ import annotations

import pytest
import torch
import triton

from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import rows_triton
from esr_kernels.divergence.losses import JSD, KLMix
from esr_kernels.divergence.statistics import RowSpec, Tile
from esr_kernels.scoring import selected_triton
from esr_kernels.scoring.tile import Tile as HeadTile
from esr_kernels.scoring.tile import UnselectedGradient

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="only the interpreter leaves the untouched pages of a tensor alone",
)
# The stride itself fits in 31 bits, as that of any real row does; twice it does not.
STRIDE, ROWS, CLASSES = (1 << 30) + 24, 3, 1100


@pytest.fixture
def far_apart(tmp_path):
    """A function that gives a [ROWS, CLASSES] tensor equal to another, rows 4 GiB apart."""
    made = []

    def spread(values: torch.Tensor) -> torch.Tensor:
        size = STRIDE * (ROWS - 1) + CLASSES
        path = tmp_path / f"{len(made)}"
        flat = torch.from_file(str(path), shared=True, size=size, dtype=values.dtype)
        made.append(flat)
        spaced = flat.as_strided((ROWS, CLASSES), (STRIDE, 1))
        return spaced.copy_(values)

    assert STRIDE < 2**31 < STRIDE * (ROWS - 1)
    return spread


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("divergence", [KLMix(0.5, 0.5), JSD(0.3)], ids=str)
def test_row_passes(far_apart, divergence):
    s, t = _logits(0), _logits(1)
    spec = RowSpec(divergence, LogitTransform(), LogitTransform())
    expected = torch.empty_like(s)
    value, _ = rows_triton.stash_rows_(Tile(s, t), None, spec, expected)
    far_s = far_apart(s)
    far_value, _ = rows_triton.stash_rows_(Tile(far_s, far_apart(t)), None, spec, far_s)
    assert expected.norm() > 0.01
    assert torch.equal(far_value, value) and torch.equal(far_s, expected)


def test_passes_over_one_head(far_apart):
    z = _logits(2)
    ids = torch.tensor([[3, 1099], [700, -1], [0, 511]])
    row = torch.full((ROWS,), 0.3)
    unselected = UnselectedGradient(top=z.amax(1), lse=row, constant=row, linear=row)
    transform = LogitTransform()
    results = []
    for logits in (z.clone(), far_apart(z)):
        tile, selected = HeadTile(logits, None, 0), torch.zeros(ROWS, 2)
        parts = selected_triton.tile_statistics(tile, transform, ids, selected, None)
        selected_dz = torch.ones(ROWS, 2)
        selected_triton.tile_gradient_(tile, transform, ids, selected_dz, unselected, logits)
        results.append((parts, selected, logits.contiguous()))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far) and near.abs().max() > 0
