"""Vectors and matrices of any strides: the results are those of contiguous copies, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esr_kernels import (
    SampleKeys,
    SamplingParams,
    group_rows,
    linear_divergence,
    linear_topk_divergence,
    sample_from_hidden,
    sample_from_logits,
    shared_prefix_attention,
    token_logprob,
)
from esr_kernels.attention.groups import RowGroups
from tests.kernels import head_cases
from tests.kernels.cases import DEVICE, TOKENS, odd_options, random_pair

IMPLS = ["auto", "torch", "triton"]


def _gaps(x: Tensor) -> Tensor:
    """The same values as every third element of memory, from the second on."""
    wide = x.new_zeros(*x.shape[:-1], 3 * x.shape[-1] + 1)
    view = wide[..., 1::3]
    view.copy_(x)
    assert x.numel() < 2 or view.stride(-1) == 3
    return view


def _turned(x: Tensor) -> Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _offset(x: Tensor) -> Tensor:
    """The same values within a larger matrix, rows at an odd distance."""
    wide = x.new_zeros(x.shape[0] + 1, x.shape[1] + 3)
    view = wide[1:, 2:-1]
    view.copy_(x)
    return view


WEIGHTS = {
    "gaps": lambda: _gaps(torch.arange(TOKENS, device=DEVICE).float() / 7),
    "expanded": lambda: torch.tensor([0.5], device=DEVICE).expand(TOKENS),
    "a column": lambda: torch.rand(TOKENS, 4, generator=torch.Generator().manual_seed(1))[:, 2],
    "backwards integers": lambda: torch.arange(TOKENS).flip(0),
}


def _divergence(tensors, options, plan, impl, reduction="sum"):
    hidden, weight = (x.detach().requires_grad_() for x in tensors[:2])
    options = dict(options)
    bias = options.get("student_bias")
    if bias is not None:
        options["student_bias"] = bias = bias.detach().requires_grad_()
    out = linear_divergence(
        hidden, weight, *tensors[2:], plan=plan, impl=impl, reduction=reduction, **options
    )
    out.loss.sum().backward()
    gradients = [x.grad for x in (hidden, weight, bias) if x is not None]
    return [*out, *gradients]


def _assert_same(ours, expected):
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_token_weights(name, impl, plan, reduction):
    if plan == "stash" and reduction == "none":
        pytest.skip("a stash takes no upstream gradient a token")
    tensors, weights = random_pair(torch.float32).tensors, WEIGHTS[name]()
    how = plan, impl, reduction
    options = {"compact": False}
    expected = _divergence(tensors, {**options, "token_weights": weights.contiguous()}, *how)
    _assert_same(_divergence(tensors, {**options, "token_weights": weights}, *how), expected)


@pytest.mark.parametrize("plan", ["stash", "recompute", "fused"])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_operand_of_linear_divergence(impl, plan):
    if plan == "fused" and impl != "triton":
        pytest.skip("fused is a Triton kernel")
    case = odd_options(torch.float32)
    labels = torch.arange(TOKENS, device=DEVICE) * 3
    extra = {"labels": labels, "label_weight": 0.3, "teacher_bias": torch.ones(1003, device=DEVICE)}
    options = {**case.options, **extra, "reduction": "sum"}
    options.pop("reduction")
    options["token_weights"] = options["token_weights"].to(DEVICE)
    expected = _divergence(case.tensors, {**options, "compact": False}, plan, impl)
    tensors = [
        shape(x) for shape, x in zip((_turned, _offset, _gaps, _turned), case.tensors, strict=True)
    ]
    for name in ("token_weights", "labels", "student_bias", "teacher_bias"):
        options[name] = _gaps(options[name])
    _assert_same(_divergence(tensors, {**options, "compact": False}, plan, impl), expected)


@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("impl", IMPLS)
def test_class_ids_and_labels(impl, plan):
    """Without weights, which would copy the labels."""
    tensors = random_pair(torch.float32).tensors
    ids = torch.randperm(1003, generator=torch.Generator().manual_seed(2))[:700].to(DEVICE)
    labels = torch.arange(TOKENS, device=DEVICE) * 3

    def run(vector):
        mapped = {"student_ids": vector(ids), "teacher_ids": vector(ids)}
        labelled = {"labels": vector(labels), "label_weight": 0.3}
        return _divergence(tensors, mapped | labelled, plan, impl)

    _assert_same(run(_gaps), run(torch.clone))


def _head():
    hidden, weight, _ = head_cases.random_head(torch.float32)
    bias = torch.randn(head_cases.CLASSES, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return hidden, weight, bias


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", ["token_logprob", "linear_topk_divergence"])
def test_ops_on_one_head(op, impl):
    count = head_cases.TOKENS
    ids = torch.arange(count * 3, device=DEVICE).view(count, 3)
    weights = torch.arange(count, device=DEVICE).float()

    def run(hidden, weight, bias, ids, logprobs, weights):
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        how = {"bias": leaves[2], "softcap": 20.0, "impl": impl}
        if op == "token_logprob":
            out = token_logprob(*leaves[:2], ids[:, 0], **how)
            (out.logprob - 0.3 * out.entropy).sum().backward()
        else:
            out = linear_topk_divergence(*leaves[:2], ids, logprobs, token_weights=weights, **how)
            out.loss.backward()
        return [*out, *(leaf.grad for leaf in leaves)]

    hidden, weight, bias = _head()
    logprobs = torch.full(ids.shape, -2.0, device=DEVICE)
    expected = run(hidden, weight, bias, ids, logprobs, weights)
    strided = _turned(hidden), _offset(weight), _gaps(bias), _turned(ids), _gaps(logprobs)
    _assert_same(run(*strided, _gaps(weights)), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("params", ["numbers", "rows"])
@pytest.mark.parametrize("source", ["logits", "hidden"])
def test_draws(source, params, impl):
    hidden, weight, bias = _head()
    rows = 6
    hidden = hidden[:rows]
    each = (
        torch.linspace(0.0, 1.5, rows, device=DEVICE),
        torch.arange(rows, device=DEVICE) * 9,
        torch.linspace(0.5, 1.0, rows, device=DEVICE),
        torch.linspace(0.0, 0.1, rows, device=DEVICE),
    )
    ids = torch.arange(rows, device=DEVICE) * 5
    step = torch.arange(rows, device=DEVICE)
    invalid = torch.arange(head_cases.CLASSES, device=DEVICE) % 7 == 0

    def draw(shape, vector):
        keys = SampleKeys(3, vector(ids), vector(step))
        own = SamplingParams(*map(vector, each)) if params == "rows" else SamplingParams(0.8)
        how = {"bias": vector(bias), "invalid": vector(invalid), "impl": impl}
        if source == "logits":
            return sample_from_logits(shape(hidden @ weight.T), keys, own, **how)
        return sample_from_hidden(shape(hidden), _offset(weight), keys, own, **how)

    _assert_same(draw(_gaps, _gaps), draw(torch.clone, torch.clone))


@pytest.mark.parametrize("impl", IMPLS)
def test_attention(impl):
    made = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(DEVICE)

    query, suffix = normal(6, 4, 16), (normal(6, 2, 5, 16), normal(6, 2, 5, 16))
    prefix = normal(2, 2, 9, 16), normal(2, 2, 9, 16)
    lengths = torch.tensor([9, 4], device=DEVICE), torch.tensor([1, 5, 2, 3, 4, 5], device=DEVICE)
    groups = group_rows([0, 0, 0, 0, 1, 1], 2, DEVICE)

    def attend(matrix, vector):
        return shared_prefix_attention(
            matrix(query),
            *map(matrix, prefix),
            vector(lengths[0]),
            *map(matrix, suffix),
            vector(lengths[1]),
            groups=RowGroups(*map(vector, groups)),
            impl=impl,
        )

    expected = attend(torch.clone, torch.clone)
    assert torch.equal(attend(_turned, _gaps), expected)
    assert torch.equal(attend(_gaps, _gaps), expected)
