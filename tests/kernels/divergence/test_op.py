"""What `linear_divergence` promises besides its numbers: edges, errors, autograd, determinism."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import product

import pytest
import torch

from esr_kernels import JSD, KLMix, linear_divergence
from tests.kernels import cases
from tests.kernels.cases import DEVICE, TOKENS

IMPLS = ["torch", "triton"]


def _case(dtype=torch.float32):
    case = cases.random_pair(dtype)
    case.student_hidden.requires_grad_()
    case.student_weight.requires_grad_()
    return case


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty_batch_gives_zero_loss_and_zero_gradients(plan, reduction, impl):
    case = _case()
    how = {"plan": plan, "reduction": reduction, "impl": impl}
    out = linear_divergence(*case.rows(slice(0)).tensors, **how)
    out.loss.backward()
    assert out.loss.item() == 0 and out.per_token.shape == (0,)
    assert torch.equal(case.student_weight.grad, torch.zeros_like(case.student_weight))
    assert torch.equal(case.student_hidden.grad, torch.zeros_like(case.student_hidden))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_all_masked_gives_zero_loss_and_a_connected_graph(plan, compact, impl):
    case = _case()
    out = linear_divergence(
        *case.tensors,
        token_weights=torch.zeros(TOKENS, device=DEVICE),
        reduction="mean",
        plan=plan,
        compact=compact,
        impl=impl,
    )
    out.loss.backward()
    assert out.loss.item() == 0
    assert case.student_hidden.grad.abs().max() == 0
    assert case.student_weight.grad.abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", ["reverse_kl", JSD(0.5)], ids=str)
def test_one_class_has_no_divergence(divergence, impl):
    hidden, weight = torch.randn(5, 4, device=DEVICE), torch.randn(1, 4, device=DEVICE)
    hidden.requires_grad_()
    out = linear_divergence(hidden, weight, hidden, weight + 1, divergence, impl=impl)
    out.loss.backward()
    assert out.per_token.abs().max() == 0 and hidden.grad.abs().max() == 0
    assert out.agreement.eq(1).all()


@pytest.mark.parametrize(
    ("plan", "compact", "impl"),
    [
        *product(["stash", "recompute"], [True, False], IMPLS),
        ("stash", None, "auto"),
        ("recompute", None, "auto"),
        ("auto", None, "reference"),
    ],
)
def test_a_row_of_weight_0_is_as_if_it_were_absent_even_if_nan(plan, compact, impl):
    case = _case()
    weights = torch.rand(TOKENS, device=DEVICE) + 0.5
    weights[[2, 9]] = 0
    kept = weights != 0
    how = {"plan": plan, "impl": impl}
    absent = linear_divergence(*case.rows(kept).tensors, token_weights=weights[kept], **how)
    (expected,) = torch.autograd.grad(absent.loss, case.student_weight)
    hidden, teacher_hidden = case.student_hidden.detach().clone(), case.teacher_hidden.clone()
    hidden[2], teacher_hidden[9] = torch.nan, torch.inf
    broken = replace(case, student_hidden=hidden.requires_grad_(), teacher_hidden=teacher_hidden)
    out = linear_divergence(*broken.tensors, token_weights=weights, compact=compact, **how)
    out.loss.backward()
    torch.testing.assert_close(out.loss, absent.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(case.student_weight.grad, expected, rtol=1e-4, atol=1e-6)
    assert hidden.grad[[2, 9]].abs().max() == 0
    assert out.per_token[[2, 9]].abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_nan_stays_in_its_row(plan, impl):
    case = _case()
    hidden = case.student_hidden.detach().clone()
    hidden[4] = torch.nan
    hidden.requires_grad_()
    out = linear_divergence(hidden, *case.tensors[1:], plan=plan, impl=impl)
    clean = linear_divergence(*case.tensors, plan=plan, impl=impl)
    out.loss.backward()
    clean.loss.backward()
    others = torch.arange(TOKENS, device=DEVICE) != 4
    assert out.per_token[4].isnan() and hidden.grad[4].isnan().all()
    assert torch.equal(out.per_token[others], clean.per_token[others])
    torch.testing.assert_close(hidden.grad[others], case.student_hidden.grad[others])


@pytest.mark.parametrize("impl", IMPLS)
def test_reduction_none_takes_any_upstream_gradient(impl):
    case = _case()
    upstream = torch.randn(TOKENS, device=DEVICE)
    out = linear_divergence(*case.tensors, reduction="none", impl=impl)
    (out.loss * upstream).sum().backward()
    per_token = case.student_weight.grad
    case.student_weight.grad = None
    linear_divergence(
        *case.tensors, token_weights=upstream, plan="stash", impl=impl
    ).loss.backward()
    torch.testing.assert_close(per_token, case.student_weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_an_upstream_gradient_scales_the_gradients(plan, dtype):
    """Not a power of two, so a stash rounds 16-bit gradients once more: by half an ulp at most."""
    case = _case(dtype)
    (linear_divergence(*case.tensors, plan=plan).loss * 2.5).backward()
    scaled = case.student_weight.grad
    case.student_weight.grad = None
    linear_divergence(*case.tensors, plan=plan).loss.backward()
    expected = 2.5 * case.student_weight.grad.float()
    assert cases.relative_error(scaled, expected) <= 2 * torch.finfo(dtype).eps


def test_second_backward_is_refused_by_stash_and_served_by_recompute():
    case = _case()
    stash = linear_divergence(*case.tensors, plan="stash").loss
    stash.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass.*recompute"):
        stash.backward()
    case.student_weight.grad = None
    recompute = linear_divergence(*case.tensors, plan="recompute").loss
    recompute.backward(retain_graph=True)
    once = case.student_weight.grad.clone()
    recompute.backward()
    assert torch.equal(case.student_weight.grad, 2 * once)


def test_double_backward_is_refused():
    case = _case()
    loss = linear_divergence(*case.tensors, plan="recompute").loss
    with pytest.raises(RuntimeError, match="no double backward.*impl='reference'"):
        torch.autograd.grad(loss, case.student_hidden, create_graph=True)


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_frozen_head_and_frozen_hidden(plan):
    case = _case()
    full = linear_divergence(*case.tensors, plan=plan)
    full.loss.backward()
    hidden_grad, weight_grad = case.student_hidden.grad, case.student_weight.grad
    case.student_hidden.grad = case.student_weight.grad = None
    frozen = case.student_weight.detach()
    linear_divergence(case.student_hidden, frozen, *case.tensors[2:], plan=plan).loss.backward()
    torch.testing.assert_close(case.student_hidden.grad, hidden_grad)
    detached = case.student_hidden.detach()
    linear_divergence(detached, *case.tensors[1:], plan=plan).loss.backward()
    torch.testing.assert_close(case.student_weight.grad, weight_grad)


def test_the_teacher_gets_no_gradient_and_no_grad_needs_no_stash():
    case = _case()
    teacher_hidden = case.teacher_hidden.clone().requires_grad_()
    out = linear_divergence(*case.tensors[:2], teacher_hidden, case.teacher_weight)
    out.loss.backward()
    assert teacher_hidden.grad is None
    with torch.no_grad():
        quiet = linear_divergence(*case.tensors)
    assert not quiet.loss.requires_grad
    torch.testing.assert_close(quiet.loss, out.loss.detach())


def test_repeated_calls_agree_bit_for_bit():
    case = _case()
    gradients = []
    for _ in range(2):
        case.student_weight.grad = None
        linear_divergence(*case.tensors).loss.backward()
        gradients.append(case.student_weight.grad)
    assert torch.equal(*gradients)


def test_non_contiguous_inputs():
    case = _case()
    transposed = case.student_hidden.detach().T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous()
    expected = linear_divergence(*case.tensors).loss
    loss = linear_divergence(transposed, *case.tensors[1:]).loss
    loss.backward()
    assert torch.equal(loss, expected) and transposed.grad is not None


def test_autocast_takes_fp32_parameters_and_returns_fp32_gradients():
    case = _case()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = linear_divergence(*case.tensors)
    out.loss.backward()
    expected = cases.ours(case.to(torch.bfloat16), "reverse_kl")
    assert case.student_weight.grad.dtype == torch.float32
    assert torch.equal(out.loss.detach(), expected["loss"])
    assert torch.equal(case.student_weight.grad, expected["d student_weight"].float())


@pytest.mark.parametrize("divergence", ["forward_kl", KLMix(0.5, 0.5), JSD(0.4)], ids=str)
def test_gradcheck_in_fp64(divergence):
    case = cases._pair(3, 11, (4, 5), (1.0, 1.0), torch.float64)
    how = {"plan": "recompute", "impl": "torch", "student_softcap": 2.0, "temperature": 1.5}
    assert torch.autograd.gradcheck(
        lambda *student: linear_divergence(*student, *case.tensors[2:], divergence, **how).loss,
        (case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()),
    )


@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_fp64_keeps_the_digits_of_the_label_weight(plan):
    case = cases.labelled(torch.float64)
    result, truth = cases.ours(case, "reverse_kl", plan=plan), cases.oracle(case, "reverse_kl")
    for name, exact in truth.items():
        assert cases.relative_error(result[name], exact) < 1e-12, name


def test_vocabularies_too_unlike_to_be_padded_are_warned_of():
    hidden, weight = torch.randn(3, 4, device=DEVICE), torch.randn(100, 4, device=DEVICE)
    heads = hidden, weight, hidden
    with pytest.warns(UserWarning, match="100 rows and teacher_weight 89: taking the first 89"):
        linear_divergence(*heads, weight[:89])
    ids = torch.arange(50, device=DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_divergence(*heads, weight[:90])
        linear_divergence(*heads, weight[:50], num_classes=50)
        linear_divergence(*heads, weight[:50], student_ids=ids, teacher_ids=ids)


@pytest.mark.parametrize("divergence", ["forward_kl", KLMix(1.0, 0.0)], ids=str)
@pytest.mark.parametrize("plan", ["stash", "recompute"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_forward_kl_is_finite_where_the_teacher_alone_lost_a_class(impl, plan, divergence):
    case = cases._pair(4, 10, (8, 8), (3.0, 3.0), torch.float32)
    hidden, weight, teacher, teacher_weight = case.tensors
    bias = torch.zeros(10, device=DEVICE)
    bias[5] = -torch.inf
    how = {"teacher_bias": bias, "plan": plan, "impl": impl}
    out = linear_divergence(hidden.requires_grad_(), *case.tensors[1:], divergence, **how)
    out.loss.backward()
    p = (hidden.detach().double() @ weight.double().T).log_softmax(1)
    q = (teacher.double() @ teacher_weight.double().T + bias.double()).softmax(1)
    exact = torch.special.xlogy(q, q).sum() - (q * p).sum()
    assert float(out.loss) == pytest.approx(float(exact), rel=1e-5)
    gradient = (p.exp() - q) @ weight.double()
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-4, atol=1e-5)
