"""The memory that a plan predicts is the memory that is taken, and a budget bounds it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from bench.measure import MIB, extra_bytes
from esr_kernels import (
    default_memory_budget,
    linear_divergence,
    plan_linear_divergence,
    release_workspace,
)
from esr_kernels.common import workspace
from esr_kernels.common.workspace import borrow
from esr_kernels.divergence.plan import Plan, Problem
from esr_kernels.divergence.planner import make_plan
from tests.kernels import cases
from tests.kernels.cases import DEVICE

TOKENS, CLASSES, DIMS = 768, 30_000, (128, 192)


@pytest.fixture(scope="module")
def operands() -> list[torch.Tensor]:
    """Student's and teacher's, of a call that has been made: the BLAS keeps buffers of its own."""
    made = [torch.randn(rows, dim, device=DEVICE) for dim in DIMS for rows in (TOKENS, CLASSES)]
    made[0].requires_grad_()
    linear_divergence(*made, plan="stash", memory_budget=200 * MIB).loss.backward()
    made[0].grad = None
    return made


@pytest.mark.parametrize(
    "kind, budget_mib, gives_weight_grad, merges",
    [
        ("stash", 200, False, ()),
        ("stash", 75, False, ()),
        ("recompute", 75, False, ()),
        ("recompute", 40, False, ()),
        ("stash", 100, True, ()),
        ("recompute", 40, True, ()),
        ("stash", 75, False, (1, 2, 29_999)),
        ("recompute", 40, False, (1, 2, 29_999)),
    ],
)
def test_predicted_peak_is_the_measured_peak_within_10_percent(
    kind, budget_mib, gives_weight_grad, merges, operands
):
    fp32, given = torch.float32, {"device": DEVICE, "weight_grad_given": gives_weight_grad}
    given["merged"] = len(merges), len(merges)
    problem = Problem(TOKENS, CLASSES, *DIMS, hidden_dtype=fp32, weight_dtype=fp32, **given)
    plan = make_plan(problem, kind, budget_mib * MIB)
    hidden, weight, teacher, teacher_weight = (x.detach() for x in operands)
    hidden.requires_grad_()
    weight.requires_grad_()
    weight_grad = torch.ones_like(weight, requires_grad=False) if gives_weight_grad else None

    def run() -> None:
        linear_divergence(
            hidden,
            weight,
            teacher,
            teacher_weight,
            weight_grad=weight_grad,
            plan=plan,
            merge_student_ids=merges or None,
            merge_teacher_ids=merges or None,
        ).loss.backward()

    release_workspace()
    measured = extra_bytes(run)
    if measured is None:
        pytest.skip("this platform does not tell a process its peak memory")
    gradients = 4 * (hidden.numel() + weight.numel() * (not gives_weight_grad))
    release_workspace()
    print(
        f"predicted {plan.extra_bytes / MIB:.0f} MiB, measured {(measured - gradients) / MIB:.0f}"
    )
    # Of the whole peak: what is returned is a part of it, and known exactly.
    assert measured == pytest.approx(plan.extra_bytes + gradients, rel=0.10)


def test_buffers_outlive_a_call_and_can_be_released():
    like = torch.empty(0)
    first = borrow("test", (4, 8), like.device, torch.float32)
    again = borrow("test", (2, 8), like.device, torch.float32)
    assert again.data_ptr() == first.data_ptr()
    assert borrow("other", (4, 8), like.device, torch.float32).data_ptr() != first.data_ptr()
    assert borrow("test", (4, 9), like.device, torch.float32).numel() == 36
    release_workspace()
    assert not workspace._buffers.by_key


def test_threads_do_not_share_buffers():
    like, seen = torch.empty(0), []
    mine = borrow("test", (4,), like.device, torch.float32)
    thread = threading.Thread(
        target=lambda: seen.append(borrow("test", (4,), like.device, torch.float32))
    )
    thread.start()
    thread.join()
    assert seen[0].data_ptr() != mine.data_ptr()


def test_teacher_logits_lie_in_the_idle_weight_gradient():
    problem = Problem(1600, 151_936, 1536, 2048)
    room = 1536 * 2 // 4  # rows of fp32 logits in a bf16 gradient of 1,536 columns
    plan = Plan("stash", problem, problem.tokens, room, problem.classes)
    assert plan.teacher_in_gradient
    without = replace(plan, logit_chunk=room + 1)
    assert not without.teacher_in_gradient
    assert without.extra_bytes > plan.extra_bytes + room * problem.classes * 4
    for change in ({"train_weight": False}, {"mapped": True}):
        assert not replace(plan, problem=replace(problem, **change)).teacher_in_gradient


def test_more_than_2_31_logits_are_planned_in_chunks():
    """T * V = 2.5e9: no buffer of a plan may hold them all, however much memory there is."""
    tokens, classes = 16_384, 151_936
    for plan in ("stash", "recompute"):
        chosen = plan_linear_divergence(tokens, classes, 1536, 3584, plan=plan)
        assert chosen.extra_bytes <= default_memory_budget("cuda")
        assert chosen.kind == plan
    assert "GEMMs" in str(chosen)
    roomy = plan_linear_divergence(
        tokens, classes, 1536, 3584, plan="stash", memory_budget=64 << 30
    )
    assert roomy.token_chunk * classes < 1 << 31


@pytest.mark.parametrize("tokens", [1, 255, 257, 1500, 1601, 4000, 8192, 8200])
@pytest.mark.parametrize("budget_mib", [1500, 2048, 8192])
def test_chunks_on_a_gpu_are_of_a_few_sizes(tokens, budget_mib):
    """Multiples of 256 tokens: gigabytes of buffers do not change size with every batch."""
    plan = make_plan(Problem(tokens, 151_936, 1536, 3584), "stash", budget_mib * MIB)
    sizes = {64, 128, *(step * 256 << i for step in (1, 3) for i in range(8))}
    sizes.add(tokens if tokens <= 256 else -(-tokens // 256) * 256)
    assert {plan.token_chunk, plan.logit_chunk} <= sizes
    longer = make_plan(Problem(20_000, 151_936, 1536, 3584), "stash", budget_mib * MIB)
    later = make_plan(Problem(20_001, 151_936, 1536, 3584), "stash", budget_mib * MIB)
    assert (longer.token_chunk, longer.logit_chunk) == (later.token_chunk, later.logit_chunk)


def test_a_stash_whose_chunk_is_larger_than_its_tokens():
    """300 tokens go through buffers of 512 rows."""
    case = cases._pair(300, 67, (24, 24), (2.0, 2.0), torch.bfloat16)
    plan = make_plan(Problem(300, 67, 24, 24), "stash", 64 * MIB)
    assert plan.token_chunk == 512
    result = cases.ours(case, "reverse_kl", plan=plan, impl="triton")
    truth = cases.oracle(case, "reverse_kl")
    baseline = cases.plain(case, "reverse_kl", rounds_dz=True)
    cases.assert_as_good_as_plain(result, baseline, truth)


@pytest.mark.parametrize(
    ("free_gib", "total_gib", "budget_mib"),
    [(79, 80, 8192), (40, 80, 8192), (12, 80, 4096), (39, 39.4, 4096), (23, 24, 2048)]
    + [(140, 141, 16384), (0.1, 24, 256)],
)
def test_the_default_budget_on_a_gpu(free_gib, total_gib, budget_mib):
    gib = 1 << 30
    assert workspace.gpu_budget(int(free_gib * gib), int(total_gib * gib)) == budget_mib * MIB


def test_the_default_budget_is_settled_once(monkeypatch):
    """A plan must not change because memory has been taken since the last call."""
    free = iter([(60 << 30, 80 << 30), (1 << 30, 80 << 30)])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: next(free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 0)
    workspace._budget_of_gpu.cache_clear()
    try:
        assert default_memory_budget("cuda:1") == default_memory_budget("cuda:1") == 8 << 30
    finally:
        workspace._budget_of_gpu.cache_clear()


def test_a_tighter_budget_takes_less_memory_and_more_traffic():
    problem = Problem(8192, 151_936, 1536, 3584)
    roomy = make_plan(problem, "stash", 4 << 30)
    tight = make_plan(problem, "stash", 1200 << 20)
    assert tight.extra_bytes <= 1200 << 20 < roomy.extra_bytes <= 4 << 30
    assert tight.bytes_moved > roomy.bytes_moved and tight.gemm_flops == roomy.gemm_flops
    assert make_plan(problem, "auto", 300 << 20).kind == "recompute"


def test_the_chunks_of_a_plan_made_for_fewer_tokens_serve_more():
    """One chunk becomes several, which sum the weight gradient apart."""
    case = cases._pair(40, 67, (24, 24), (2.0, 2.0), torch.bfloat16)
    problem = Problem(16, 67, 24, 24, device=DEVICE)
    plan = Plan("stash", problem, 16, 8, 67)
    assert plan.teacher_in_gradient and not plan.sums_weight_apart
    result = cases.ours(case, "reverse_kl", plan=plan, impl="torch")
    truth = cases.oracle(case, "reverse_kl")
    baseline = cases.plain(case, "reverse_kl", cases.rounds_dz("torch"))
    cases.assert_as_good_as_plain(result, baseline, truth)
