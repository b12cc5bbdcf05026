"""The row passes move the bytes that the cost model says, and no more."""

from __future__ import annotations

import pytest
import torch
import triton

from bench.count_bytes import CLASSES, TOKENS, counted, row_traffic
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.call import Operands
from esr_kernels.divergence.fused_triton import Blocks, fused_stats
from esr_kernels.divergence.losses import JSD, ForwardKL, KLMix, ReverseKL
from esr_kernels.divergence.plan import Plan, Problem
from esr_kernels.divergence.statistics import COLUMNS, RowSpec

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="bytes are counted in Triton's interpreter"
)
ELEMENTS = TOKENS * CLASSES


def _a_row_pass(passes, name):
    return passes[name].loaded / ELEMENTS, passes[name].stored / ELEMENTS


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [
        (ForwardKL(), torch.bfloat16),
        (ReverseKL(), torch.float32),
        (KLMix(0.5, 0.5), torch.bfloat16),
        (JSD(0.3), torch.bfloat16),
    ],
    ids=str,
)
def test_every_logit_is_read_once_a_pass(divergence, dtype):
    passes = row_traffic(divergence, dtype)
    between = [] if divergence.kl_weights is not None else ["pull sums"]
    assert list(passes) == ["statistics", *between, "gradient"]
    loaded, stored = _a_row_pass(passes, "statistics")
    assert 8 <= loaded < 8.08, "both logits; eight of each once more, to look up the largest"
    assert 0 < stored < 0.08, "40 bytes a split of a row"
    for name in between:
        loaded, stored = _a_row_pass(passes, name)
        assert loaded == pytest.approx(8, rel=0.01) and loaded >= 8
        assert 0 < stored < 0.08
    loaded, stored = _a_row_pass(passes, "gradient")
    assert loaded == pytest.approx(8, rel=0.01) and loaded >= 8
    assert stored == dtype.itemsize


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [(ReverseKL(), torch.bfloat16), (ReverseKL(), torch.float32), (JSD(0.3), torch.bfloat16)],
    ids=str,
)
def test_the_cost_model_counts_the_same(divergence, dtype):
    """Heads of no width leave what the model counts for each logit element.

    Of it, the GEMMs write both logits, and two read dz.
    """
    problem = Problem(
        tokens=TOKENS,
        classes=CLASSES,
        student_dim=0,
        teacher_dim=0,
        hidden_dtype=dtype,
        weight_dtype=dtype,
        two_pass=divergence.kl_weights is None,
    )
    by_gemms = 8 + 2 * problem.gradient_bytes
    measured = sum(traffic.total for traffic in row_traffic(divergence, dtype).values())
    stash = Plan("stash", problem, TOKENS, TOKENS, CLASSES).bytes_moved / ELEMENTS - by_gemms
    assert measured / ELEMENTS == pytest.approx(stash, rel=0.01)
    # Recompute writes the logits of every pass anew.
    projections = 3 if problem.two_pass else 2
    recompute = Plan("recompute", problem, TOKENS, TOKENS, CLASSES).bytes_moved / ELEMENTS
    recompute -= 8 * projections + 2 * problem.gradient_bytes
    assert measured / ELEMENTS == pytest.approx(recompute, rel=0.01)
    if dtype == torch.bfloat16 and not problem.two_pass:
        assert stash == 18


def test_the_fused_kernel_moves_operands_only():
    """A tile loads its tokens' states and its classes' heads; not one byte grows with T * V."""
    blocks = Blocks(tokens=16, classes=16, depth=16, warps=4, stages=2)
    tokens, classes, dims = 32, 80, (24, 40)
    s_hidden, s_weight, t_hidden, t_weight = (
        torch.randn(n, dim) for dim in dims for n in (tokens, classes)
    )
    x = Operands(s_hidden, s_weight, None, None, t_hidden, t_weight, None, None, None)
    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())
    with counted() as traffic:
        parts = fused_stats(x, spec, blocks)
    tiles = (tokens // blocks.tokens) * (classes // blocks.classes)
    assert traffic.loaded == tiles * (blocks.tokens + blocks.classes) * sum(dims) * 4
    assert traffic.stored == tokens * parts.shape[1] * COLUMNS * 4
