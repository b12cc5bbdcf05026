"""token_logprob: no worse than plain PyTorch against fp64, and what it promises besides."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from esr_kernels import token_logprob
from esr_kernels.common import matmul
from esr_kernels.common.head import check_head
from esr_kernels.common.transform import LogitTransform
from esr_kernels.scoring import reference, selected
from esr_kernels.scoring.selected import select_classes
from tests.kernels import cases, head_cases
from tests.kernels.cases import DEVICE
from tests.kernels.head_cases import HEADS, TOKENS

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _tokens(case, likely=False):
    """A token for each row, one row left out; the most probable ones where `likely`."""
    hidden, weight, options = case
    classes = options.get("num_classes", weight.shape[0])
    if likely:
        logits = hidden.float() @ weight.float().T
        if "bias" in options:
            # A class that the bias removes would have a log-probability of -inf.
            logits = logits + options["bias"].float()
        tokens = logits[:, :classes].argmax(1)
    else:
        generator = torch.Generator().manual_seed(5)
        tokens = torch.randint(40, classes - 1, (hidden.shape[0],), generator=generator).to(DEVICE)
    if hidden.shape[0] > 4:
        tokens[4] = -100
    return tokens


def _backward(output):
    """Both outputs at once, with upstream gradients of either sign."""
    upstream = head_cases._normal(3, len(output["logprob"]), seed=6).to(DEVICE)
    return sum(
        (output[k] * u).sum() for k, u in zip(("logprob", "entropy"), upstream, strict=False)
    )


def _three(case, tokens, backward=_backward, **how):
    """(ours, plain PyTorch, oracle)."""
    rounds_dz = how.get("impl") == "triton"
    return (
        head_cases.run(token_logprob, case, (tokens,), backward, **how),
        head_cases.run(
            lambda *a, **k: reference.token_logprob(*a, dtype=torch.float32, **k),
            case,
            (tokens,),
            backward,
            rounds_dz=rounds_dz,
        ),
        head_cases.run(reference.token_logprob, case, (tokens,), backward, torch.float64),
    )


_ALL = list(product(HEADS, [False, True], DTYPES))
_ON_CPU = list(product(HEADS, [False, True], DTYPES[:1]))
_ON_CPU += [(head, bool(i % 2), DTYPES[1 + i % 2]) for i, head in enumerate(HEADS)]


@pytest.mark.parametrize(
    ("head", "likely", "dtype", "impl"),
    [
        *((*combination, "torch") for combination in _ON_CPU),
        *((*combination, "triton") for combination in cases.thinned(_ALL, 7)),
    ],
    ids=str,
)
def test_no_worse_than_plain_pytorch(head, likely, dtype, impl):
    case = HEADS[head](dtype)
    cases.assert_as_good_as_plain(*_three(case, _tokens(case, likely), impl=impl))


@pytest.mark.parametrize("output", ["logprob", "entropy", "lse"])
def test_each_output_alone_has_its_gradient(output):
    case = HEADS["odd_options"](torch.float32)
    three = _three(case, _tokens(case), lambda fields: fields[output].sum(), impl="torch")
    cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize("impl", IMPLS)
def test_tiles_of_classes_change_nothing(impl, monkeypatch):
    """A budget of 128 classes: no larger buffer of logits exists, and the result stays as good."""
    case = HEADS["odd_options"](torch.float32)
    budget = TOKENS * 128 * 4
    largest, project = [], matmul.project

    def spy(hidden, weight, out, *rest):
        largest.append(out.numel() * out.element_size())
        return project(hidden, weight, out, *rest)

    monkeypatch.setattr(matmul, "project", spy)
    three = _three(case, _tokens(case), impl=impl, memory_budget=budget)
    cases.assert_as_good_as_plain(*three)
    assert max(largest) <= budget and len(largest) == 2 * 8


def test_gradcheck_in_fp64():
    hidden, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (7, 3)))
    bias = torch.randn(7, dtype=torch.float64)
    tokens = torch.tensor([0, 6, -100, 3])
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprob(
            h, w, tokens, bias=b, softcap=2.0, temperature=1.5, logit_scale=0.8, num_classes=7
        ),
        (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.parametrize("damage", ["zero dX", "halve dX", "zero dW", "halve dW", "bf16 logits"])
def test_the_suite_notices_a_wrong_gradient(damage, monkeypatch):
    """A mutation check: the criterion above must fail when the op is broken on purpose."""
    case = HEADS["random_head"](torch.float32)
    name = {"dX": "hidden_gradient", "dW": "weight_gradient"}.get(damage[-2:])
    if name is None:
        project = matmul.project

        def rounded(hidden, weight, out):
            return out.copy_(project(hidden, weight, out).to(torch.bfloat16))

        monkeypatch.setattr(matmul, "project", rounded)
    else:
        compute = getattr(matmul, name)
        factor = 0.0 if damage.startswith("zero") else 0.5
        monkeypatch.setattr(
            matmul, name, lambda *args, alpha, **how: compute(*args, alpha=alpha * factor, **how)
        )
    three = _three(case, _tokens(case), impl="torch")
    with pytest.raises(AssertionError, match="d (hidden|weight)"):
        cases.assert_as_good_as_plain(*three)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_position_left_out_is_as_if_it_were_absent_even_if_nan(impl):
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    tokens = _tokens((hidden, weight, {}))
    kept = tokens != -100
    broken = torch.where(kept[:, None], hidden, torch.nan).requires_grad_()
    weight.requires_grad_()
    out = token_logprob(broken, weight, tokens, impl=impl)
    absent = token_logprob(hidden[kept], weight, tokens[kept], impl=impl)
    for ours, expected in zip(out, absent, strict=True):
        assert torch.equal(ours[kept], expected) and ours[~kept].eq(0).all()
    (out.logprob + out.entropy).sum().backward()
    assert broken.grad[~kept].eq(0).all() and broken.grad.isfinite().all()
    if DEVICE == "cpu":
        # On a GPU the row is multiplied by 0 in the product, and 0 * NaN reaches the weight.
        assert weight.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_left_out_are_masked_where_counting_them_would_stall(impl, monkeypatch):
    """As on a GPU: the rows are computed, and their outputs and gradients replaced by 0."""
    case = HEADS["odd_options"](torch.float32)
    dropped = head_cases.run(token_logprob, case, (_tokens(case),), _backward, impl=impl)
    monkeypatch.setattr(selected, "values_are_at_hand", lambda rows: False)
    masked = head_cases.run(token_logprob, case, (_tokens(case),), _backward, impl=impl)
    for name, value in dropped.items():
        torch.testing.assert_close(masked[name], value, rtol=1e-5, atol=1e-6)
    broken = case[0].clone()
    broken[4] = torch.nan
    with_nan = head_cases.run(
        token_logprob, (broken, *case[1:]), (_tokens(case),), _backward, impl=impl
    )
    for name in ("logprob", "entropy", "lse", "d hidden"):
        assert torch.equal(with_nan[name], masked[name]) and masked[name][4].eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_row(impl):
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    tokens = _tokens((hidden, weight, {}))
    clean = token_logprob(hidden, weight, tokens, impl=impl)
    broken = hidden.clone()
    broken[7] = torch.nan
    broken.requires_grad_()
    out = token_logprob(broken, weight, tokens, impl=impl)
    out.logprob.sum().backward()
    others = torch.arange(TOKENS, device=DEVICE) != 7
    for ours, expected in zip(out, clean, strict=True):
        assert ours[7].isnan() and torch.equal(ours[others], expected[others])
    assert broken.grad[7].isnan().all() and broken.grad[others].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_one_class_and_nothing_but_ignored_rows(impl):
    hidden = torch.randn(5, 4, device=DEVICE, requires_grad=True)
    weight = torch.randn(9, 4, device=DEVICE, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    ignored = torch.full((5,), -100, device=DEVICE)
    certain = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    for arguments in (
        (hidden[:0], weight, none),
        (hidden, weight, ignored),
        (hidden, weight[:1], certain),
    ):
        hidden.grad = weight.grad = None
        out = token_logprob(*arguments, impl=impl)
        assert out.logprob.shape == out.entropy.shape == arguments[2].shape
        assert out.logprob.eq(0).all() and out.entropy.eq(0).all()
        (out.logprob + out.entropy).sum().backward()
        assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_of_probability_0_has_minus_infinity(impl):
    hidden, weight, options = HEADS["minus_infinity"](torch.float32)
    tokens = torch.full((TOKENS,), 7, device=DEVICE)
    out = token_logprob(hidden, weight, tokens, impl=impl, **options)
    assert out.logprob.eq(-torch.inf).all() and out.entropy.isfinite().all()


def test_a_certain_token_keeps_the_digits_of_its_doubt():
    """log p of a token 25 logits ahead: -1e-10, where 1 - p in fp32 is 0."""
    weight = torch.tensor([[25.0], [0.0], [0.0]], device=DEVICE)
    out = token_logprob(torch.ones(1, 1, device=DEVICE), weight, torch.tensor([0], device=DEVICE))
    expected = -2 * torch.tensor(-25.0, device=DEVICE).exp()
    torch.testing.assert_close(out.logprob[0], expected, rtol=1e-6, atol=0)


def test_any_number_of_backwards_and_no_double_backward():
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    hidden.requires_grad_()
    loss = token_logprob(hidden, weight, _tokens((hidden, weight, {}))).logprob.sum()
    (once,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(once, twice)
    with pytest.raises(RuntimeError, match="token_logprob has no double backward.*'reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast_takes_fp32_parameters_and_returns_fp32_gradients():
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    tokens = _tokens((hidden, weight, {}))
    weight.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = token_logprob(hidden, weight, tokens)
    out.logprob.sum().backward()
    rounded = (hidden.bfloat16(), weight.detach().bfloat16(), {})
    expected = head_cases.run(token_logprob, rounded, (tokens,), lambda o: o["logprob"].sum())
    assert out.logprob.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(out.logprob.detach(), expected["logprob"])
    assert torch.equal(weight.grad, expected["d weight"].float())


_GOOD = {
    "hidden": torch.randn(4, 3),
    "weight": torch.randn(7, 3),
    "tokens": torch.tensor([0, 1, 6, -100]),
}
_BAD = {
    "id too large": (
        {"tokens": torch.tensor([0, 7, 1, 2])},
        ValueError,
        "tokens must be from 0 to 6, or -100 to leave a position out, got 7 at position 1",
    ),
    "id negative": ({"tokens": torch.tensor([0, 1, 2, -1])}, ValueError, "got -1 at position 3"),
    "id of padding": ({"num_classes": 6}, ValueError, "tokens must be from 0 to 5.*got 6"),
    "count": ({"tokens": torch.tensor([0, 1])}, ValueError, r"tokens.*shape \[4\], got \[2\]"),
    "int32": ({"tokens": torch.zeros(4).int()}, TypeError, "tokens must be int64, got torch.int32"),
    "list": ({"tokens": [0, 1, 2, 3]}, TypeError, "tokens must be a torch.Tensor, got list"),
    "hidden size": ({"weight": torch.randn(7, 4)}, ValueError, "weight must have 3 columns"),
    "dimensions": ({"hidden": torch.randn(2, 2, 3)}, ValueError, "hidden must have 2 dimensions"),
    "dtype": ({"weight": torch.randn(7, 3).bfloat16()}, TypeError, "same dtype outside of autoc"),
    "integers": ({"hidden": torch.ones(4, 3).long()}, TypeError, "hidden must be one of.*int64"),
    "no classes": ({"num_classes": 0}, ValueError, "num_classes must be an integer from 1 to 7"),
    "many classes": ({"num_classes": 8}, ValueError, "num_classes.*rows of weight, got 8"),
    "empty head": ({"weight": torch.randn(0, 3)}, ValueError, "weight must have at least one row"),
    "bias": ({"bias": torch.ones(6)}, ValueError, r"bias must have shape \[7\]"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0"),
    "softcap": (
        {"softcap": -1.0},
        ValueError,
        "softcap must be None or finite and above 0, got -1.0",
    ),
    "scale": ({"logit_scale": 0.0}, ValueError, "logit_scale must be finite and not 0, got 0.0"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of.*'cuda'"),
    "budget": ({"memory_budget": 10}, ValueError, "memory_budget of 10 bytes is too small.*384"),
    "no budget": (
        {"memory_budget": 0},
        ValueError,
        "memory_budget must be a positive whole",
    ),
    "fp64 kernels": (
        {
            "hidden": torch.ones(4, 3).double(),
            "weight": torch.ones(7, 3).double(),
            "impl": "triton",
        },
        TypeError,
        "impl='triton' computes in fp32",
    ),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input_names_the_argument(name):
    change, error, message = _BAD[name]
    with pytest.raises(error, match=message):
        token_logprob(**{**_GOOD, **change})


@pytest.mark.parametrize("impl", IMPLS)
def test_an_id_out_of_range_that_no_check_saw_gives_nan_in_its_row(impl):
    """As on a GPU, where the ids are not looked at."""
    hidden, weight, _ = HEADS["random_head"](torch.float32)
    ids = torch.full((TOKENS, 1), 3, device=DEVICE)
    ids[2], ids[5] = weight.shape[0], -7
    head = check_head(
        "",
        hidden,
        weight,
        None,
        LogitTransform(),
        None,
        impl,
    )
    selected = select_classes(head, ids, None, op="test", impl=impl, memory_budget=None)
    logits = selected.logits[:, 0]
    assert logits.isnan().nonzero()[:, 0].tolist() == [2, 5]
