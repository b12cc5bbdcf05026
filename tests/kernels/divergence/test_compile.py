"""Under torch.compile `linear_divergence` is a node of one graph and gives what it does eagerly."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from esr_kernels import (
    JSD,
    Divergence,
    KLMix,
    LinearDivergenceLoss,
    TotalVariation,
    linear_divergence,
    plan_linear_divergence,
)
from esr_kernels.divergence.compiled import stash_limit
from esr_kernels.divergence.plan import MIB, Problem
from tests.kernels import cases
from tests.kernels.cases import DEVICE, TOKENS


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _loss_of(case, names, divergence="reverse_kl", **how):
    """A function of the leaves alone, with work around the op for the compiler to trace."""
    options = {**case.options, **how}

    def run(*leaves):
        tensors = dict(zip(names, leaves, strict=True))
        student = tensors["student_hidden"] * 1.5, tensors["student_weight"]
        bias = {"student_bias": tensors.get("student_bias")}
        out = linear_divergence(*student, *case.tensors[2:], divergence, **{**options, **bias})
        return (out.loss * 2.5).sum(), *out

    return run


def _assert_equal(run, leaves, backend="aot_eager"):
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for ours, expected in zip(compiled(*leaves), run(*leaves), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
        assert ours.requires_grad == expected.requires_grad
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(compiled(*leaves)[0], wanted)
    for ours, expected in zip(gradients, torch.autograd.grad(run(*leaves)[0], wanted), strict=True):
        assert ours.dtype == expected.dtype and expected.norm() > 0
        assert cases.relative_error(ours, expected) < 1e-5


def _assert_alike(loss, expected, leaf):
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    (ours,), (exact,) = (torch.autograd.grad(value, leaf) for value in (loss, expected))
    assert cases.relative_error(ours, exact) < 1e-5


@pytest.mark.parametrize(
    "make, divergence, plan, reduction",
    [
        ("odd_options", "reverse_kl", "stash", "mean"),
        ("odd_options", JSD(0.3), "recompute", "mean"),
        ("odd_options", "forward_kl", "recompute", "none"),
        ("labelled", KLMix(0.2, 0.8), "stash", "sum"),
        ("labelled", "reverse_kl", "recompute", "none"),
        ("mapped_vocabularies", TotalVariation(), "stash", "sum"),
        ("mapped_vocabularies", "reverse_kl", "recompute", "mean"),
        ("random_pair", "jeffreys", "auto", "sum"),
    ],
    ids=str,
)
def test_one_graph_equals_eager(make, divergence, plan, reduction):
    case = cases.CASES[make](torch.float32)
    leaves, _ = cases._leaves(case, None)
    run = _loss_of(case, list(leaves), divergence, plan=plan, reduction=reduction)
    _assert_equal(run, tuple(leaves.values()))


def test_16_bit_autocast_and_a_frozen_head():
    case = cases.random_pair(torch.float32)

    def run(hidden):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = linear_divergence(hidden @ torch.eye(24, device=DEVICE), *case.tensors[1:])
        return out

    _assert_equal(run, (case.student_hidden.requires_grad_(),))


def test_a_head_and_the_loss_as_modules():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(24, 24, device=DEVICE)
            self.head = nn.Linear(24, 1003, bias=False, device=DEVICE)
            self.divergence = LinearDivergenceLoss(JSD(0.4), reduction="mean")

        def forward(self, x, teacher_hidden, teacher_weight):
            return self.divergence(
                torch.tanh(self.body(x)), self.head.weight, teacher_hidden, teacher_weight
            )

    case, student = cases.random_pair(torch.float32), Student()
    arguments = case.student_hidden, case.teacher_hidden, case.teacher_weight
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(call(*arguments).loss, list(student.parameters()))
        for call in (compiled, student)
    )
    for gradient, exact in zip(found, expected, strict=True):
        assert cases.relative_error(gradient, exact) < 1e-5


def test_one_graph_serves_any_number_of_tokens():
    """The first call is for its own size, the second for any."""
    case = cases.random_pair(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(hidden, teacher_hidden, weights):
        tensors = hidden, case.student_weight, teacher_hidden, case.teacher_weight
        return linear_divergence(*tensors, token_weights=weights).loss

    hidden = case.student_hidden.requires_grad_()
    for tokens in (TOKENS, 19, 11, 7, 2):
        weights = torch.arange(float(tokens), device=DEVICE)
        loss = run(hidden[:tokens], case.teacher_hidden[:tokens], weights)
        few = case.rows(slice(tokens))
        expected = linear_divergence(*few.tensors, token_weights=weights).loss
        _assert_alike(loss, expected, hidden)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("plan", ["auto", "recompute"])
def test_a_compiler_told_that_every_size_varies(plan):
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, classes in ((5, 31), (9, 37)):
        case = cases._pair(tokens, classes, (8, 12), (1.0, 1.0), torch.float32)
        hidden = case.student_hidden.requires_grad_()
        loss = compiled(*case.tensors, plan=plan).loss
        expected = linear_divergence(*case.tensors, plan=plan).loss
        _assert_alike(loss, expected, hidden)


def test_the_plan_of_a_graph_holds_up_to_a_number_of_tokens():
    problem = Problem(0, 151_936, 4096, 4096)
    budget = 2 << 30
    limit, sizes = stash_limit(problem, budget), (151_936, 4096, 4096)
    assert plan_linear_divergence(limit, *sizes, memory_budget=budget).kind == "stash"
    assert plan_linear_divergence(2 * limit, *sizes, memory_budget=budget).kind == "recompute"
    assert stash_limit(Problem(0, 1000, 8, 8, per_token_gradient=True), None) == -1
    assert stash_limit(Problem(0, 1000, 8, 8, train_hidden=False, train_weight=False), None) == -1
    assert stash_limit(Problem(0, 151_936, 4096, 4096), 1) == -1


def test_a_plan_made_before():
    case = cases.random_pair(torch.float32)
    how = {"dtype": torch.float32, "device": DEVICE, "memory_budget": 18 * MIB}
    plan = plan_linear_divergence(TOKENS, 1003, 24, 40, plan="recompute", **how)
    leaves, _ = cases._leaves(case, None)
    _assert_equal(_loss_of(case, list(leaves), plan=plan), tuple(leaves.values()))


@dataclass(frozen=True)
class _HalfSquare(Divergence):
    """scale * sum (p - q)^2 / 2: not one of the package's."""

    scale: float = 1.0

    def summand(self, p, q, log_ratio):
        return 0.5 * self.scale * (p - q) ** 2

    def pull(self, p, q, log_ratio):
        return self.scale * p * (p - q)


def test_a_divergence_of_the_users():
    case = cases.random_pair(torch.float32)
    leaves, _ = cases._leaves(case, None)
    run = _loss_of(case, list(leaves), _HalfSquare(3.0), impl="torch", plan="recompute")
    _assert_equal(run, tuple(leaves.values()))


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_weight_grad_is_added_to_in_the_compiled_backward(plan):
    case = cases.random_pair(torch.float32)
    hidden = case.student_hidden.requires_grad_()

    def run(weight_grad):
        out = linear_divergence(hidden * 1.5, *case.tensors[1:], weight_grad=weight_grad, plan=plan)
        return out.loss * 2.5

    ours, expected = (torch.ones_like(case.student_weight) for _ in range(2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(ours).backward()
        run(expected).backward()
    assert (expected - 1).norm() > 0
    assert cases.relative_error(ours - 1, expected - 1) < 1e-5


def test_export_with_any_number_of_tokens():
    class Evaluate(nn.Module):
        def forward(self, hidden, weight, teacher_hidden, teacher_weight):
            return linear_divergence(hidden * 1.5, weight, teacher_hidden, teacher_weight).per_token

    case = cases.random_pair(torch.float32)
    tokens = torch.export.Dim("tokens", min=2, max=5000)
    exported = torch.export.export(
        Evaluate(), case.tensors, dynamic_shapes=({0: tokens}, None, {0: tokens}, None)
    )
    fewer = case.rows(slice(7)).tensors
    torch.testing.assert_close(exported.module()(*fewer), Evaluate()(*fewer), rtol=1e-6, atol=0)


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_operators_keep_pytorchs_rules(plan):
    """Schema, fake tensors, autograd registration, and a trace of forward and backward."""
    from esr_kernels.divergence import compiled

    operator = compiled._stash if plan == "stash" else compiled._recompute
    case = cases._pair(4, 19, (3, 5), (1.0, 1.0), torch.float32, extra_classes=(1, 0))
    bias = torch.randn(19, device=DEVICE, requires_grad=True)
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)
    case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    teacher = *case.tensors[2:], None, None, None
    operands = *case.tensors[:2], bias, None, *teacher, weights, None
    loss = "esr_kernels.divergence.losses.KLMix", [0.5, 0.5]
    transforms = [1.0, 0.0, 1.0], [1.0, 5.0, 0.7]
    how = 0.0, 19, "mean", plan, [], None, None, "torch"
    options = compiled._Options(*loss, *transforms, *how, [2, 5], [5, 2], True, [True, True, True])
    torch.library.opcheck(operator, (*operands, *options))


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_inductor(plan):
    """Half a minute, most of it the C++ compiler's."""
    case = cases.odd_options(torch.float32)
    leaves, _ = cases._leaves(case, None)
    run = _loss_of(case, list(leaves), plan=plan)
    _assert_equal(run, tuple(leaves.values()), backend="inductor")
