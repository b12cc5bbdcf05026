"""No op waits for the GPU: nothing on its path reads a value, so CUDA graphs can hold it.

Without a GPU the same path runs on the CPU (Triton's kernels, and what depends on values skipped),
under a mode that fails on every operation that would have to wait.
"""

from __future__ import annotations

import sys

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from esr_kernels import (
    SampleKeys,
    SamplingParams,
    linear_divergence,
    linear_topk_divergence,
    sample_from_hidden,
    token_logprob,
)
from esr_kernels.common import arguments as shared_arguments
from esr_kernels.divergence import arguments as checks
from esr_kernels.divergence import autograd
from esr_kernels.scoring import selected, topk
from tests.kernels import cases, head_cases
from tests.kernels.cases import DEVICE, TOKENS
from tests.kernels.imagined_gpu import READS_VALUES


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        assert name not in READS_VALUES, f"{name} makes the host wait"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            assert all(x.dtype not in (torch.bool, torch.uint8) for x in indices), "a mask as index"
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            leaves, arrives = args[0].device.type, torch.device(kwargs["device"]).type
            assert arrives in (leaves, DEVICE), "a copy to the host"
            if arrives != leaves:
                assert kwargs["non_blocking"] and args[0].is_pinned(), "a copy that blocks"
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """What the package does with values where they are at hand, it leaves out on a GPU."""
    modules = (
        autograd,
        checks,
        shared_arguments,
        selected,
        topk,
        sys.modules["esr_kernels.scoring.token_logprob"],
    )
    for module in modules:
        monkeypatch.setattr(module, "can_read_values", lambda tensor: False)
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    # The interpreter reads what kernels are given; a GPU's launcher does not.
    launch = interpreter.GridExecutor.__call__

    def launched(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


@pytest.mark.parametrize("damage", ["item", "nonzero", "mask", "bool"])
def test_the_mode_notices_waiting(damage):
    x = torch.ones(3, device=DEVICE)
    actions = {
        "item": lambda: x[0].item(),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 0],
        "bool": lambda: bool(x.all()),
    }
    with pytest.raises(AssertionError, match="makes the host wait|a mask as index"), _NoWaiting():
        actions[damage]()


@pytest.mark.parametrize(
    "make, dtype, divergence, how",
    [
        ("odd_options", torch.bfloat16, "reverse_kl", {"plan": "stash"}),
        ("random_pair", torch.float16, "jsd", {"plan": "recompute"}),
        ("labelled", torch.float16, "forward_kl", {"plan": "stash"}),
        ("labelled", torch.bfloat16, "forward_kl", {"plan": "recompute", "reduction": "none"}),
        ("mapped_vocabularies", torch.bfloat16, "reverse_kl", {"plan": "stash"}),
        ("mapped_vocabularies", torch.float16, "reverse_kl", {"plan": "recompute"}),
        ("random_pair", torch.bfloat16, "reverse_kl", {"plan": "fused"}),
        ("merged_classes", torch.bfloat16, "jsd", {"plan": "stash"}),
        ("merged_and_mapped", torch.float16, "reverse_kl", {"plan": "recompute"}),
    ],
    ids=str,
)
def test_linear_divergence_does_not_wait(make, dtype, divergence, how):
    case = cases.CASES[make](dtype)
    with _NoWaiting():
        cases.ours(case, divergence, impl="triton", compact=False, **how)


def test_waiting_in_a_backward_would_show(monkeypatch):
    """On CPU the stash looks at the upstream factor."""
    case = cases.random_pair(torch.float32)
    case = cases.Case(*(x.cpu() for x in case.tensors))
    monkeypatch.setattr(autograd, "can_read_values", lambda tensor: True)
    with pytest.raises(AssertionError, match="makes the host wait"), _NoWaiting():
        cases.ours(case, "reverse_kl", impl="torch", plan="stash")


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_adding_to_weight_grad_does_not_wait(plan):
    case = cases.random_pair(torch.bfloat16)
    weight_grad = torch.zeros(case.student_weight.shape, device=DEVICE)
    with _NoWaiting():
        hidden = case.student_hidden.requires_grad_()
        out = linear_divergence(
            hidden, *case.tensors[1:], weight_grad=weight_grad, plan=plan, impl="triton"
        )
        (out.loss * 0.5).backward()
    assert weight_grad.norm() > 0


@pytest.mark.parametrize(
    ("op", "options"),
    [
        (token_logprob, {}),
        (linear_topk_divergence, {"tail": "bucket", "reduction": "mean"}),
        (linear_topk_divergence, {"tail": "renormalise", "reduction": "mean"}),
    ],
)
def test_ops_on_one_head_do_not_wait(op, options):
    case = head_cases.odd_options(torch.bfloat16)
    if op is token_logprob:
        arguments, backward = head_cases.tokens(case), head_cases.of_tokens
    else:
        arguments, backward = head_cases.teacher(case), head_cases.of_rows
        weights = (torch.arange(head_cases.TOKENS, device=DEVICE) % 3).float()
        options = {**options, "token_weights": weights}

    def unwatched(output):
        with torch.utils._python_dispatch._disable_current_modes():
            return backward(output)  # copies its factors to the device

    with _NoWaiting():
        result = head_cases.run(op, case, arguments, unwatched, impl="triton", **options)
    assert result["d hidden"].norm() > 0


@pytest.mark.parametrize("params", [SamplingParams(0.7), SamplingParams(0.8, 40, 0.95, 0.01)])
def test_sample_from_hidden_does_not_wait(params):
    """With every option on the device: a CUDA graph can hold the call and advance the step."""
    hidden, weight, _ = head_cases.random_head(torch.float32)
    invalid = torch.zeros(head_cases.CLASSES, dtype=torch.bool, device=DEVICE)
    keys = SampleKeys(0, torch.arange(2, device=DEVICE), torch.tensor(3, device=DEVICE))
    call = hidden[:2], weight, keys, params
    with _NoWaiting():
        drawn = sample_from_hidden(*call, invalid=invalid, softcap=4.0, impl="triton")
    expected = sample_from_hidden(*call, invalid=invalid, softcap=4.0, impl="torch")
    assert torch.equal(drawn.tokens, expected.tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("plan", ["stash", "recompute", "fused"])
def test_a_cuda_graph_replays_forward_and_backward(plan):
    case = cases.random_pair(torch.bfloat16)
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    weights = torch.rand(TOKENS, device=DEVICE)

    def step():
        out = linear_divergence(*case.tensors, token_weights=weights, plan=plan)
        return out.loss, *torch.autograd.grad(out.loss, (hidden, weight))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        weights.mul_(2)
        hidden.mul_(0.5)
    graph.replay()
    for ours, expected in zip(captured, step(), strict=True):
        assert torch.equal(ours, expected)
