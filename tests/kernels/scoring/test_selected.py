"""The engine that token_logprob and linear_topk_divergence share: what holds for both ops."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from esr_kernels import linear_topk_divergence, token_logprob
from esr_kernels.common.arguments import check_head
from esr_kernels.common.transform import LogitTransform
from esr_kernels.scoring import selected
from esr_kernels.scoring.selected import select_classes
from tests.kernels import cases, head_cases
from tests.kernels.cases import DEVICE
from tests.kernels.head_cases import HEADS, TOKENS

IMPLS = ["torch", "triton"]
# One upstream gradient a row: every field but the loss is a number of a row already.
OPS = {
    "token_logprob": (token_logprob, {}),
    "bucket": (linear_topk_divergence, {"reduction": "none"}),
    "renormalise": (linear_topk_divergence, {"reduction": "none", "tail": "renormalise"}),
}


def _arguments(name, case):
    return head_cases.tokens(case) if name == "token_logprob" else head_cases.teacher(case)


# Three tiles of 384 classes, at 4 bytes a logit and 2 a gradient; ids at their edges, -1 for none.
BUDGET = TOKENS * 384 * 6
IDS = torch.tensor([0, 383, 384, 767, 768, 997, -1, 5, 300, -1, 600, 601], device=DEVICE)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "make"), [*product(OPS, ["odd_options"]), ("token_logprob", "random_head")]
)
def test_tiles_on_the_gpu_path(name, make):
    """Launch shapes that the numerics of the two ops leave out, for `make sanitize`."""
    (op, options), case = OPS[name], HEADS[make](torch.bfloat16)
    if op is token_logprob:
        tokens = IDS.repeat(2)[:TOKENS]
        arguments = (torch.where(tokens < 0, -100, tokens),)
    else:
        ids = torch.stack([IDS.roll(row) for row in range(TOKENS)])
        logprobs = head_cases._normal(*ids.shape, seed=3).to(DEVICE).log_softmax(1) - 0.2
        arguments = ids, logprobs
    three = head_cases.three(op, case, arguments, impl="triton", memory_budget=BUDGET, **options)
    cases.assert_as_good_as_plain(*three)


@pytest.mark.kernels
def test_a_row_split_over_programs():
    """5,003 classes are five blocks, with a program for each where there is one token."""
    case = head_cases.head(torch.float32, 2.0, tokens=1, classes=5003)
    tokens = torch.tensor([2047], device=DEVICE)
    cases.assert_as_good_as_plain(*head_cases.three(token_logprob, case, (tokens,), impl="triton"))


@pytest.mark.parametrize("damage", cases.DAMAGES)
@pytest.mark.parametrize("name", OPS)
def test_the_suite_notices_a_wrong_gradient(name, damage, monkeypatch):
    """A mutation check: the criterion of the numerics must fail when an op is broken on purpose."""
    (op, options), case = OPS[name], HEADS["random_head"](torch.float32)
    cases.damage_products(monkeypatch, damage)
    three = head_cases.three(op, case, _arguments(name, case), impl="torch", **options)
    with pytest.raises(AssertionError, match="d (hidden|weight)"):
        cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize(
    ("name", "divergence"),
    [("token_logprob", None), *product(["bucket", "renormalise"], ["forward_kl", "reverse_kl"])],
)
def test_gradcheck_in_fp64(name, divergence):
    op, options = OPS[name]
    shapes = (4, 3), (7, 3), (7,)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    transform = {"softcap": 2.0, "temperature": 1.5, "logit_scale": 0.8}
    if divergence is None:
        arguments = (torch.tensor([0, 6, -100, 3]),)
    else:
        options = {**options, "divergence": divergence}
        top = torch.randn(4, 7, dtype=torch.float64).log_softmax(-1).topk(3)
        ids = top.indices.clone()
        ids[1, 1:] = -1
        arguments = ids, top.values

    def call(hidden, weight, bias):
        out = op(hidden, weight, *arguments, bias=bias, **transform, **options)
        return tuple(field for field in out if field.requires_grad)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", ["dropped", "masked, as on a GPU"])
@pytest.mark.parametrize("name", ["token_logprob", "bucket"])
def test_a_row_left_out_is_as_if_it_were_absent_even_if_nan(name, how, impl, monkeypatch):
    if how != "dropped":
        monkeypatch.setattr(selected, "can_read_values", lambda rows: False)
    (op, options), case = OPS[name], HEADS["odd_options"](torch.float32)
    hidden, weight, transform = case
    arguments, kept = _arguments(name, case), torch.ones(TOKENS, dtype=torch.bool, device=DEVICE)
    kept[[4, 9]] = False
    if op is token_logprob:
        arguments[0][~kept] = -100
        left_out = options
    else:
        left_out = {**options, "token_weights": kept.float()}
    present = op(
        hidden[kept],
        weight.requires_grad_(),
        *(argument[kept] for argument in arguments),
        impl=impl,
        **transform,
        **options,
    )
    (expected,) = torch.autograd.grad(sum(field.sum() for field in present), weight)
    for is_nan in (False, True):
        given = torch.where(kept[:, None], hidden, torch.nan) if is_nan else hidden
        given = given.detach().requires_grad_()
        out = op(given, weight, *arguments, impl=impl, **transform, **left_out)
        for ours, exact in zip(out, present, strict=True):
            torch.testing.assert_close(ours[kept], exact, rtol=1e-5, atol=1e-6)
            assert ours[~kept].eq(0).all()
        gradients = torch.autograd.grad(sum(field.sum() for field in out), (given, weight))
        assert gradients[0][~kept].eq(0).all() and gradients[0][kept].norm() > 0
        torch.testing.assert_close(gradients[1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPS)
def test_nan_stays_in_its_row(name, impl):
    (op, options), case = OPS[name], HEADS["random_head"](torch.float32)
    hidden, weight, _ = case
    arguments = _arguments(name, case)
    clean = op(hidden, weight, *arguments, impl=impl, **options)
    broken = hidden.clone()
    broken[7] = torch.nan
    out = op(broken.requires_grad_(), weight, *arguments, impl=impl, **options)
    out[0].sum().backward()
    others = torch.arange(TOKENS, device=DEVICE) != 7
    for ours, expected in zip(out, clean, strict=True):
        assert ours[7].isnan() and torch.equal(ours[others], expected[others])
    assert broken.grad[7].isnan().all() and broken.grad[others].isfinite().all()


@pytest.mark.parametrize("name", ["token_logprob", "bucket"])
def test_any_number_of_backwards_and_no_double_backward(name):
    (op, options), case = OPS[name], HEADS["random_head"](torch.float32)
    hidden, weight, _ = case
    loss = op(hidden.requires_grad_(), weight, *_arguments(name, case), **options)[0].sum()
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(once, twice)
    with pytest.raises(RuntimeError, match=f"{op.__name__} has no double backward.*'reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("name", ["token_logprob", "bucket"])
def test_autocast_takes_fp32_parameters_and_returns_fp32_gradients(name):
    (op, options), case = OPS[name], HEADS["random_head"](torch.float32)
    hidden, weight, _ = case
    arguments = _arguments(name, case)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = op(hidden, weight.requires_grad_(), *arguments, **options)
    out[0].sum().backward()
    rounded = hidden.bfloat16(), weight.detach().bfloat16().requires_grad_()
    expected = op(*rounded, *arguments, **options)
    expected[0].sum().backward()
    assert out[0].dtype == weight.grad.dtype == torch.float32
    assert torch.equal(out[0], expected[0])
    assert torch.equal(weight.grad, rounded[1].grad.float())


@pytest.mark.parametrize("impl", IMPLS)
def test_an_id_out_of_range_that_no_check_saw_gives_nan_in_its_row(impl):
    """As on a GPU, where the ids are not looked at."""
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    ids = torch.full((TOKENS, 1), 3, device=DEVICE)
    ids[2], ids[5] = weight.shape[0], -7
    head = check_head("", hidden, weight, None, LogitTransform(), None, impl)
    found = select_classes(head, ids, None, op="test", impl=impl, memory_budget=None)
    assert found.logits[:, 0].isnan().nonzero()[:, 0].tolist() == [2, 5]
