"""plan="fused": `linear_divergence` whose forward is one Triton kernel, statistics only."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product, repeat

import pytest
import torch

from esr_kernels import JSD, KLMix, linear_divergence, plan_linear_divergence
from esr_kernels.divergence.plan import Problem
from esr_kernels.divergence.planner import make_plan
from tests.kernels import cases
from tests.kernels.cases import DEVICE

CASES = ["random_pair", "odd_options", "labelled", "minus_infinity"]
DIVERGENCES = ["forward_kl", KLMix(0.3, 0.7), JSD(0.3)]


def _small(make, dtype):
    """A case of the suite cut to few classes: the interpreter takes milliseconds a tile."""
    case = cases.CASES[make](dtype)
    options = dict(case.options)
    if "num_classes" in options:
        options["num_classes"] = 150
    for name in ("student_bias", "teacher_bias"):
        if name in options:
            options[name] = options[name][:155]
    if "labels" in options:
        options["labels"] = torch.where(options["labels"] < 155, options["labels"], -100)
    return replace(
        case,
        student_weight=case.student_weight[:155],
        teacher_weight=case.teacher_weight[:155],
        options=options,
    )


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("dtype", "make", "divergence"),
    [
        *product([torch.float32], CASES, DIVERGENCES),
        *zip(repeat(torch.bfloat16), CASES, cycle(DIVERGENCES), strict=False),
    ],
    ids=str,
)
def test_no_worse_than_plain_pytorch(dtype, make, divergence):
    case = _small(make, dtype)
    result = cases.ours(case, divergence, plan="fused", impl="triton")
    truth = cases.oracle(case, divergence)
    baseline = cases.plain(case, divergence, rounds_dz=True)
    cases.assert_as_good_as_plain(result, baseline, truth)


def test_a_call_without_gradients_takes_it_by_itself():
    case = _small("labelled", torch.float32)
    with torch.no_grad():
        auto = linear_divergence(*case.tensors, impl="triton", **case.options)
        named = linear_divergence(*case.tensors, plan="fused", impl="triton", **case.options)
        tiles = linear_divergence(*case.tensors, plan="recompute", impl="triton", **case.options)
    assert not auto.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(auto, named, strict=True))
    for a, b in zip(auto, tiles, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(auto.per_token, tiles.per_token), "they round differently"


def test_any_upstream_gradient():
    case = _small("random_pair", torch.float32)
    upstream = torch.linspace(-1.0, 2.0, cases.TOKENS, device=DEVICE)
    gradients = []
    for plan in ("fused", "recompute"):
        hidden = case.student_hidden.detach().requires_grad_()
        out = linear_divergence(
            hidden, *case.tensors[1:], reduction="none", plan=plan, impl="triton"
        )
        (out.loss * upstream).sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_no_tokens():
    case = _small("random_pair", torch.float32).rows(slice(0))
    out = linear_divergence(*case.tensors, plan="fused", impl="triton")
    assert out.loss == 0 and out.per_token.shape == (0,)


def test_cpu_and_mapped_vocabularies_have_other_plans():
    case = cases.mapped_vocabularies(torch.float32)
    with pytest.raises(ValueError, match="plan='fused' is a Triton kernel.*plan='recompute'"):
        linear_divergence(*case.tensors, plan="fused", impl="torch", **case.options)
    with pytest.raises(ValueError, match="plan='fused' takes no student_ids.*plan='recompute'"):
        linear_divergence(*case.tensors, plan="fused", impl="triton", **case.options)


def test_its_plan_holds_no_logits():
    sizes = (8192, 151_936, 512, 512)
    quiet = {"train_hidden": False, "train_weight": False}
    plan = plan_linear_divergence(*sizes, **quiet)
    assert plan.kind == "fused" and "no logits in memory" in str(plan)
    # Statistics of at most 40 splits of the classes, 40 bytes each, and what merging them takes.
    assert plan.extra_bytes == 8192 * 40 * 2 * 40
    tiles = plan_linear_divergence(*sizes, **quiet, plan="recompute")
    assert plan.gemm_flops == tiles.gemm_flops and 15 * plan.bytes_moved < tiles.bytes_moved


def test_auto_weighs_its_slower_gemms_against_the_traffic_of_logits():
    """Small models are bound by the logits' traffic, large ones by the GEMMs."""
    chosen = [
        make_plan(Problem(8192, 151_936, dim, dim, train_hidden=False, train_weight=False)).kind
        for dim in (256, 512, 1024, 4096)
    ]
    assert chosen == ["fused", "fused", "recompute", "recompute"]
    for change in ({"device": "cpu"}, {"rows": "torch"}, {"mapped": True}):
        problem = Problem(8192, 151_936, 512, 512, train_weight=False, train_hidden=False)
        assert make_plan(replace(problem, **change)).kind == "recompute"
