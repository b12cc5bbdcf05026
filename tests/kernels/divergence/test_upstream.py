"""The factor of the backward under a stash; calls that want no gradient, or an odd one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esr_kernels import (
    JSD,
    default_memory_budget,
    linear_divergence,
    plan_linear_divergence,
    release_workspace,
)
from esr_kernels.common import matmul
from esr_kernels.divergence.compiled import stash_limit
from esr_kernels.divergence.plan import Problem
from esr_kernels.divergence.planner import make_plan
from tests.kernels import cases
from tests.kernels.cases import DEVICE


def _gradient(dtype: torch.dtype, factor: float, call) -> torch.Tensor:
    tensors = cases.random_pair(dtype).tensors
    tensors[1].requires_grad_()
    loss = call(*tensors, plan="stash", reduction="mean").loss
    (loss * factor).backward()
    return tensors[1].grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 1 / 3), (torch.float16, 65536.0)], ids=str
)
def test_the_factor_is_not_rounded_to_the_dtype_of_the_gradient(dtype, factor, compiled):
    torch._dynamo.reset()
    call = linear_divergence
    if compiled:
        call = torch.compile(linear_divergence, backend="aot_eager", fullgraph=True)
    scaled = _gradient(dtype, factor, call)
    expected = (_gradient(dtype, 1.0, linear_divergence).float() * factor).to(dtype)
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0)


def test_auto_recomputes_under_fp16_where_a_stash_would_round_before_the_loss_scale():
    problem = Problem(1024, 50_000, 512, 512, torch.float16, torch.float16)
    assert make_plan(problem).kind != "stash"
    assert make_plan(problem, "stash").kind == "stash"
    assert make_plan(Problem(1024, 50_000, 512, 512)).kind == "stash"


def test_training_after_an_evaluation_in_inference_mode():
    tensors = cases.random_pair(torch.float32).tensors
    release_workspace()
    with torch.inference_mode():
        linear_divergence(*tensors)
    tensors[0].requires_grad_()
    linear_divergence(*tensors).loss.backward()
    assert torch.isfinite(tensors[0].grad).all()
    release_workspace()


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(matmul, "weight_gradient", fail)
    monkeypatch.setattr(matmul, "hidden_gradient", fail)
    tensors = cases.random_pair(torch.float32).tensors
    tensors[0].requires_grad_(), tensors[1].requires_grad_()
    plan = plan_linear_divergence(
        cases.TOKENS, 1003, 24, 40, device=DEVICE, dtype=torch.float32, plan="stash"
    )
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        outputs = [linear_divergence(*tensors, plan=how) for how in ("auto", "stash", plan)]
        outputs += [compiled(*tensors, plan=how) for how in ("auto", "stash")]
    for out in outputs:
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, outputs[0].loss, rtol=1e-6, atol=0)


def test_a_bias_alone_is_trained_within_the_budget():
    sizes = {"tokens": 8192, "classes": 151_936, "student_dim": 1024, "teacher_dim": 1024}
    frozen = Problem(**sizes, train_hidden=False, train_weight=False, train_bias=True)
    assert frozen.needs_gradient and make_plan(frozen).extra_bytes <= default_memory_budget("cuda")
    case = cases.random_pair(torch.float32)
    bias = torch.zeros(1003, device=DEVICE, requires_grad=True)
    for how in ("auto", "stash", "recompute"):
        linear_divergence(*case.tensors, JSD(), student_bias=bias, plan=how).loss.backward()
    reference_bias = bias.detach().clone().requires_grad_()
    linear_divergence(
        *case.tensors, JSD(), student_bias=reference_bias, impl="reference"
    ).loss.backward()
    torch.testing.assert_close(bias.grad, 3 * reference_bias.grad, rtol=1e-4, atol=1e-6)


def test_the_reference_keeps_fp32_under_autocast():
    tensors = [t.float() for t in cases.random_pair(torch.bfloat16).tensors]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = linear_divergence(*tensors).per_token
        plain = linear_divergence(*tensors, impl="reference").per_token
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_labels_for_logging_alone_never_touch_the_loss():
    tensors = cases.random_pair(torch.float32).tensors
    bias = torch.zeros(1003, device=DEVICE)
    bias[5] = -torch.inf
    labels = torch.full((cases.TOKENS,), 5, device=DEVICE)
    for impl in ("auto", "reference"):
        out = linear_divergence(*tensors, student_bias=bias, labels=labels, impl=impl)
        assert torch.isfinite(out.loss)
        assert torch.isinf(out.cross_entropy).all()


def test_a_label_that_is_no_class_gives_nan_where_nobody_looks(monkeypatch):
    monkeypatch.setattr("esr_kernels.divergence.arguments.can_read_values", lambda tensor: False)
    tensors = cases.random_pair(torch.float32).tensors
    labels = torch.full((cases.TOKENS,), -100, device=DEVICE)
    labels[2], labels[4] = 1003, 7
    out = linear_divergence(*tensors, labels=labels, label_weight=0.5, reduction="none")
    assert torch.isnan(out.loss).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("megabytes", [40, 60, 80, 100, 150, 320])
def test_a_graph_that_stashes_fits_its_budget_at_any_number_of_tokens(megabytes):
    problem = Problem(1, 151_936, 64, 64, torch.float32, torch.float32, "cpu", rows="torch")
    limit = stash_limit(problem, megabytes * 10**6)
    for tokens in {*range(1, min(limit, 300) + 1), limit - 1, 3 * limit // 4 + 1} - {0}:
        if 0 < tokens <= limit:
            make_plan(replace(problem, tokens=tokens), "stash", megabytes * 10**6)
    assert limit >= (64 if megabytes >= 60 else -1)
