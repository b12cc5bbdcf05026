"""linear_divergence against the fp64 oracle: no worse than plain PyTorch, however it runs."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import (
    JSD,
    Jeffreys,
    KLMix,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    execute,
)
from tests.kernels import cases

DIVERGENCES = [
    "forward_kl",
    "reverse_kl",
    KLMix(0.25, 0.75),
    Jeffreys(),
    JSD(0.3),
    SkewForwardKL(0.2),
    SkewReverseKL(0.2),
    TotalVariation(),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=_name)
@pytest.mark.parametrize("case_name", cases.CASES)
def test_no_worse_than_plain_pytorch(case_name, divergence, dtype, plan, impl):
    if dtype == torch.float16 and divergence not in ("reverse_kl", JSD(0.3)):
        return  # fp16 differs from bf16 in range only: one divergence of each kind shows it
    case = cases.CASES[case_name](dtype)
    truth = cases.oracle(case, divergence)
    baseline = cases.plain(case, divergence, rounds_dz=impl == "triton")
    result = cases.ours(case, divergence, plan=plan, impl=impl)
    cases.assert_as_good_as_plain(result, baseline, truth)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=_name)
def test_identical_models_have_no_divergence_and_no_gradient(divergence, plan, impl):
    """Up to rounding: 1e-6 of the gradient of a random pair, or what plain PyTorch leaves."""
    case = cases.identical(torch.float32)
    baseline = cases.plain(case, divergence)
    result = cases.ours(case, divergence, plan=plan, impl=impl)
    scale = cases.ours(cases.random_pair(torch.float32), divergence, plan=plan, impl=impl)
    assert result["per_token"].abs().max() <= 4e-6
    assert result["agreement"].eq(1).all()
    for name in ("d student_hidden", "d student_weight"):
        assert result[name].norm() <= max(1e-6 * scale[name].norm(), baseline[name].norm())


@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_chunking_does_not_change_the_result(plan, chunks):
    """Many tokens, a budget that forces several chunks, and still no worse than plain PyTorch."""
    case = cases._pair(300, 2501, (24, 40), (2.0, 2.0), torch.float32)
    budget = 24 << 20 if chunks == "one" else 18 << 20
    truth, baseline = cases.oracle(case, "reverse_kl"), cases.plain(case, "reverse_kl")
    result = cases.ours(case, "reverse_kl", plan=plan, memory_budget=budget, impl="torch")
    cases.assert_as_good_as_plain(result, baseline, truth)


@pytest.mark.parametrize("damage", ["zero dX", "halve dX", "zero dW", "halve dW", "bf16 logits"])
def test_the_suite_notices_a_wrong_gradient(damage, monkeypatch):
    """A mutation check: the criterion above must fail when the op is broken on purpose."""
    name = {"dX": "hidden_gradient", "dW": "weight_gradient"}.get(damage[-2:])
    if name is None:
        project = execute.gemm.project

        def rounded(hidden, weight, out, ids=None):
            return out.copy_(project(hidden, weight, out, ids).to(torch.bfloat16))

        monkeypatch.setattr(execute.gemm, "project", rounded)
    else:
        compute = getattr(execute.gemm, name)
        factor = 0.0 if damage.startswith("zero") else 0.5

        def damaged(*args, alpha, accumulate):
            compute(*args, alpha=alpha * factor, accumulate=accumulate)

        monkeypatch.setattr(execute.gemm, name, damaged)
    for dtype in (torch.float32, torch.bfloat16):
        for make in (cases.random_pair, cases.nearly_equal):
            case = make(dtype)
            truth, baseline = cases.oracle(case, "reverse_kl"), cases.plain(case, "reverse_kl")
            result = cases.ours(case, "reverse_kl", impl="torch", plan="stash")
            with pytest.raises(AssertionError, match="d student"):
                cases.assert_as_good_as_plain(result, baseline, truth)
