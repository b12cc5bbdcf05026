"""`weight_grad`: the head's gradient added to fp32 memory of the caller's, such as `main_grad`."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from esr_kernels import linear_divergence, plan_linear_divergence
from esr_kernels.divergence.plan import Plan, Problem
from esr_kernels.divergence.planner import make_plan
from tests.kernels import cases
from tests.kernels.cases import DEVICE, TOKENS

PLANS = ["stash", "recompute"]


def _run(case, upstream=1.0, **how):
    """Gradients by name after one backward, None where there is none."""
    leaves, options = cases._leaves(case, None)
    student = leaves["student_hidden"], leaves["student_weight"]
    out = linear_divergence(*student, *case.tensors[2:], **{**options, **how})
    (out.loss * upstream).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def _filled(case):
    generator = torch.Generator().manual_seed(11)
    shape = case.student_weight.shape
    return torch.randn(shape, generator=generator).to(DEVICE) * 1e-3


def _assert_added(case, before, after):
    """What was added is the gradient with fp32's error, and one rounding of the sum. On a GPU a
    gradient of 16-bit logits has rounded before, and is as good as plain PyTorch's."""
    truth = cases.oracle(case, "reverse_kl")["d student_weight"]
    added = after.double() - before.double()
    rounding = torch.finfo(torch.float32).eps * float(before.norm() / truth.norm())
    allowed = 1e-5
    if DEVICE == "cuda" and case.student_hidden.dtype.itemsize == 2:
        baseline = cases.plain(case, "reverse_kl", rounds_dz=True)["d student_weight"]
        allowed = cases.ALLOWED_RATIO * cases.relative_error(baseline, truth)
    assert cases.relative_error(added, truth) < allowed + rounding


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", ["random_pair", "odd_options", "mapped_vocabularies"])
def test_it_holds_the_unrounded_gradient_and_autograd_none(make, dtype, plan):
    case = cases.CASES[make](dtype)
    case.upstream = 1.0
    weight_grad = _filled(case)
    before = weight_grad.clone()
    gradients = _run(case, weight_grad=weight_grad, plan=plan, impl="torch")
    assert gradients["student_weight"] is None
    _assert_added(case, before, weight_grad)
    expected = _run(case, plan=plan, impl="torch")
    for name in gradients.keys() - {"student_weight"}:
        assert torch.equal(gradients[name], expected[name])


@pytest.mark.parametrize(
    ("reduction", "plan"), [*product(["sum", "mean"], PLANS), ("none", "recompute")]
)
def test_reductions_and_upstream_factors(reduction, plan):
    case = cases.random_pair(torch.float32)
    upstream = torch.linspace(0.5, 2.0, TOKENS, device=DEVICE) if reduction == "none" else 2.5
    weight_grad = torch.zeros_like(case.student_weight)
    _run(case, upstream, weight_grad=weight_grad, reduction=reduction, plan=plan)
    expected = _run(case, upstream, reduction=reduction, plan=plan)["student_weight"]
    torch.testing.assert_close(weight_grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("plan", PLANS)
def test_two_micro_batches_accumulate_whatever_the_order_of_their_backwards(plan):
    case = cases.random_pair(torch.float32)
    weight_grad = torch.zeros_like(case.student_weight)
    hidden = case.student_hidden.requires_grad_()
    halves = [slice(0, 9), slice(9, TOKENS)]
    losses = [
        linear_divergence(*case.rows(half).tensors, weight_grad=weight_grad, plan=plan).loss
        for half in halves
    ]
    assert weight_grad.abs().max() == 0, "nothing is added before a backward"
    losses[1].backward()
    losses[0].backward()
    whole = _run(case, plan=plan)
    torch.testing.assert_close(weight_grad, whole["student_weight"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden.grad, whole["student_hidden"], rtol=1e-4, atol=1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", ["random_pair", "mapped_vocabularies"])
def test_on_the_gpu_path(make, dtype, plan):
    """dz is rounded to 16 bits before the GEMM there, which is all that is lost."""
    case = cases.CASES[make](dtype)
    weight_grad = _filled(case)
    before = weight_grad.clone()
    _run(case, weight_grad=weight_grad, plan=plan, impl="triton")
    truth = cases.oracle(case, "reverse_kl")["d student_weight"]
    baseline = cases.plain(case, "reverse_kl", rounds_dz=True)["d student_weight"]
    error = cases.relative_error(weight_grad.double() - before.double(), truth)
    assert error <= cases.ALLOWED_RATIO * cases.relative_error(baseline, truth)


def test_plans_count_its_memory():
    """A stash holds an fp32 gradient until the backward, recompute writes where it belongs."""
    problem = Problem(1600, 151_936, 1536, 2048, weight_grad_given=True)
    fresh = Problem(1600, 151_936, 1536, 2048)
    head = 151_936 * 1536 * 4
    one_chunk = Plan("stash", problem, 1600, 64, 151_936).extra_bytes
    assert one_chunk == Plan("stash", fresh, 1600, 64, 151_936).extra_bytes + head
    recompute = make_plan(problem, "recompute", 1 << 30)
    assert recompute.extra_bytes == make_plan(fresh, "recompute", 1 << 30).extra_bytes
    assert make_plan(problem, "auto", 1 << 30).kind == "recompute"
    assert plan_linear_divergence(1600, 151_936, 1536, 2048).kind == "stash"
