"""linear_topk_divergence: no worse than plain PyTorch against fp64, and its other promises."""

from __future__ import annotations

import math
from itertools import cycle, product

import pytest
import torch

from esr_kernels import linear_divergence, linear_topk_divergence
from tests.kernels import cases, head_cases
from tests.kernels.cases import DEVICE
from tests.kernels.head_cases import CLASSES, HEADS, TOKENS

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIVERGENCES = ["forward_kl", "reverse_kl"]
TAILS = ["bucket", "renormalise"]


def _three(case, teacher, **how):
    return head_cases.three(linear_topk_divergence, case, teacher, **{"reduction": "none", **how})


_NEAR = list(product(DIVERGENCES, TAILS, DTYPES))
_ALL = [(head, *rest) for head in HEADS for rest in _NEAR]
# 16-bit on CPU: one head for each divergence, tail and dtype.
_ON_CPU = [combination for combination in _ALL if combination[-1] == torch.float32]
_ON_CPU += [
    (head, *rest) for head, rest in zip(cycle(HEADS), _NEAR, strict=False) if rest[-1].itemsize == 2
]


@pytest.mark.parametrize(
    ("head", "divergence", "tail", "dtype", "impl"),
    [
        *((*combination, "torch") for combination in _ON_CPU),
        *((*combination, "triton") for combination in cases.thinned(_ALL, 7, 7)),
    ],
    ids=str,
)
def test_no_worse_than_plain_pytorch(head, divergence, tail, dtype, impl):
    case = HEADS[head](dtype)
    three = _three(case, head_cases.teacher(case), divergence=divergence, tail=tail, impl=impl)
    cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize(
    ("divergence", "tail", "dtype", "impl"),
    [
        *((*combination, "torch") for combination in _NEAR),
        *((*combination, "triton") for combination in cases.thinned(_NEAR, 5, 5)),
    ],
    ids=str,
)
def test_no_worse_where_the_teacher_nearly_agrees(divergence, tail, dtype, impl):
    case = head_cases.head(dtype, 3.0)
    teacher = head_cases.teacher(case, noise=0.02)
    three = _three(case, teacher, divergence=divergence, tail=tail, impl=impl)
    cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_worse_with_weights_of_which_some_are_0(reduction, impl):
    case = HEADS["odd_options"](torch.float32)
    weights = head_cases._normal(TOKENS, seed=9).abs().to(DEVICE)
    weights[::5] = 0
    three = _three(
        case, head_cases.teacher(case), token_weights=weights, reduction=reduction, impl=impl
    )
    cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [1, 300])
def test_tiles_of_classes_change_nothing(k, impl):
    case = HEADS["odd_options"](torch.float32)
    teacher = head_cases.teacher(case, k=k)
    three = _three(case, teacher, impl=impl, memory_budget=TOKENS * 128 * 4)
    cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_classes_listed_give_the_whole_divergence(divergence, tail, impl):
    """K = V, in any order: what linear_divergence computes from the teacher's hidden states."""
    case = cases._pair(9, 37, (8, 8), (2.0, 2.0), torch.float32)
    teacher_logits = case.teacher_hidden @ case.teacher_weight.T
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids = order.expand(9, -1)
    logprobs = teacher_logits.log_softmax(-1).gather(1, ids)
    leaves = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    whole = linear_divergence(*case.tensors, divergence, impl=impl)
    expected = torch.autograd.grad(whole.loss, leaves)
    ours = linear_topk_divergence(
        *leaves, ids, logprobs, divergence=divergence, tail=tail, impl=impl
    )
    gradients = torch.autograd.grad(ours.loss, leaves)
    torch.testing.assert_close(ours.per_token, whole.per_token, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.student_mass, torch.ones_like(ours.student_mass))
    for gradient, exact in zip(gradients, expected, strict=True):
        assert cases.relative_error(gradient, exact) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_bucket_is_a_divergence_below_the_whole_one(divergence):
    """0 <= KL on K + 1 classes <= KL on V classes, closer with every class that is listed."""
    case = cases._pair(TOKENS, CLASSES, (24, 40), (2.0, 2.0), torch.float32)
    whole = linear_divergence(*case.tensors, divergence).per_token
    logprobs = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(-1)
    below = torch.zeros_like(whole)
    for k in (1, 4, 30, 500):
        top = logprobs.topk(k)
        bucket = linear_topk_divergence(
            *case.tensors[:2], top.indices, top.values, divergence=divergence
        ).per_token
        assert (bucket >= below * (1 - 1e-5)).all() and (bucket > 0).all()
        below = bucket
    assert (below <= whole * (1 + 1e-5)).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_a_student_that_agrees_has_no_divergence_and_hardly_a_gradient(divergence, tail):
    hidden, weight, _ = head_cases.head(torch.float32, 3.0)
    ids, logprobs = head_cases.teacher((hidden, weight, {}), noise=0.0)
    other = head_cases.teacher((hidden, weight, {}))
    hidden.requires_grad_()
    how = {"divergence": divergence, "tail": tail}
    out = linear_topk_divergence(hidden, weight, ids, logprobs, **how)
    far = linear_topk_divergence(hidden, weight, *other, **how)
    assert (out.per_token >= 0).all() and out.per_token.max() <= 1e-9
    scale = torch.autograd.grad(far.loss, hidden)[0].norm()
    assert torch.autograd.grad(out.loss, hidden)[0].norm() <= 1e-5 * scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_lists_everything_within_rounding_stays_finite(divergence, impl):
    """The K sum to 1 or a little more in fp32: the tail is as large as the rounding, no more."""
    hidden, weight, _ = head_cases.head(torch.float32, 1.0)
    hidden.requires_grad_()
    ids = torch.arange(3, device=DEVICE).expand(TOKENS, -1)
    logprobs = torch.tensor([0.5, 0.3, 0.2000001], device=DEVICE).log().expand(TOKENS, -1)
    out = linear_topk_divergence(hidden, weight, ids, logprobs, divergence=divergence, impl=impl)
    out.loss.backward()
    assert out.per_token.isfinite().all() and (out.per_token > 0).all()
    assert hidden.grad.isfinite().all() and hidden.grad.norm() > 0
    if divergence == "forward_kl":
        restricted = linear_topk_divergence(hidden, weight, ids, logprobs, tail="renormalise")
        # KL(q || p) = KL(q || p restricted) - log(mass of p), but for a tail of about 1e-6.
        exact = restricted.per_token - out.student_mass.log()
        torch.testing.assert_close(out.per_token, exact, rtol=1e-5, atol=0)


def test_values_by_hand():
    """Student (1/2, 1/4, 1/8, 1/8), teacher 3/4 on class 0 and the rest somewhere."""
    weight = torch.tensor([[4.0], [2.0], [1.0], [1.0]], device=DEVICE).log()
    hidden = torch.ones(1, 1, device=DEVICE)
    teacher = torch.tensor([[0, -1]], device=DEVICE), torch.tensor([[0.75, 0.0]], device=DEVICE)
    teacher = teacher[0], teacher[1].log()
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    for name, value in (("forward_kl", forward), ("reverse_kl", reverse)):
        out = linear_topk_divergence(hidden, weight, *teacher, divergence=name)
        assert out.loss.item() == pytest.approx(value, rel=1e-6)
        assert out.student_mass.item() == pytest.approx(0.5, rel=1e-6)
        assert out.student_lse.item() == pytest.approx(math.log(8), rel=1e-6)
        nothing = linear_topk_divergence(
            hidden, weight, *teacher, divergence=name, tail="renormalise"
        )
        assert nothing.loss.item() == 0


def test_reductions_by_hand():
    """The reference shares `reduce_rows` with the op, so comparing the two misses its mistakes."""
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    teacher = head_cases.teacher((hidden, weight, {}))
    weights = torch.arange(TOKENS, device=DEVICE) % 3
    rows = linear_topk_divergence(hidden, weight, *teacher).per_token
    for given, total in ((None, TOKENS), (weights, weights.sum()), (weights * 0, 1)):
        weighted = rows if given is None else rows * given
        for reduction, expected in (
            ("none", weighted),
            ("sum", weighted.sum()),
            ("mean", weighted.sum() / total),
        ):
            out = linear_topk_divergence(
                hidden, weight, *teacher, token_weights=given, reduction=reduction
            )
            torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", TAILS)
def test_nan_of_the_teacher_reaches_the_gradient(tail, divergence, impl):
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    ids, logprobs = head_cases.teacher((hidden, weight, {}))
    broken = logprobs.clone()
    broken[7, 0] = torch.nan
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    out = linear_topk_divergence(
        hidden, weight, ids, broken, divergence=divergence, tail=tail, impl=impl
    )
    out.loss.backward()
    others = torch.arange(TOKENS, device=DEVICE) != 7
    assert out.loss.isnan() and out.per_token[7].isnan() and out.per_token[others].isfinite().all()
    assert hidden.grad[7].isnan().all() and hidden.grad[others].isfinite().all()
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_nothing_to_learn_gives_0_and_a_connected_graph(reduction, tail, impl):
    """No rows, rows of weight 0, rows without ids, and a vocabulary of one class."""
    hidden = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 4, device=DEVICE, requires_grad=True)
    ids = torch.zeros(5, 1, dtype=torch.int64, device=DEVICE)
    half = torch.full((5, 1), 0.5, device=DEVICE).log()
    for arguments, weights in (
        ((hidden[:0], weight, ids[:0], half[:0]), None),
        ((hidden, weight, ids, half), torch.zeros(5, device=DEVICE)),
        ((hidden, weight, ids - 1, half), None),
        ((hidden, weight[:1], ids, torch.zeros(5, 1, device=DEVICE)), None),
    ):
        hidden.grad = weight.grad = None
        out = linear_topk_divergence(
            *arguments, tail=tail, token_weights=weights, reduction=reduction, impl=impl
        )
        assert out.loss.item() == 0 and out.per_token.shape == arguments[2].shape[:1]
        out.loss.backward()
        assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


def test_the_reference_behind_impl_is_the_reference():
    case = HEADS["odd_options"](torch.float32)
    ours, plain, _ = _three(case, head_cases.teacher(case), impl="reference")
    for name, value in plain.items():
        assert torch.equal(ours[name], value)
