"""Arguments that no call could use: refused by name, eagerly and in a compiled graph."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import (
    JSD,
    KLMix,
    LinearDivergenceLoss,
    SampleKeys,
    default_memory_budget,
    linear_divergence,
    plan_linear_divergence,
    sample_from_hidden,
    token_logprob,
)
from esr_kernels.common import arguments as shared_arguments
from tests.kernels import cases


def _tensors() -> list[torch.Tensor]:
    """On the CPU, where values of ids and labels are looked at."""
    return [tensor.cpu() for tensor in cases.random_pair(torch.float32).tensors]


_STASH = plan_linear_divergence(23, 1003, 24, 40, device="cpu", dtype=torch.float32, plan="stash")
_WRONG = [
    ({"divergence": "reverse-kl"}, "got 'reverse-kl'; did you mean 'reverse_kl'"),
    ({"divergence": "kl"}, "divergence must be one of.*'kl'"),
    ({"teacher_hidden": torch.randn(5, 40)}, "same number of tokens, got 23 and 5"),
    ({"student_weight": torch.randn(7, 23)}, r"student_weight must have 24 columns.*\[7, 23\]"),
    ({"num_classes": 1004}, "num_classes.*from 1 to 1003.*got 1004"),
    ({"num_classes": 0}, "num_classes.*got 0"),
    ({"num_classes": True}, "num_classes must be an integer"),
    ({"student_hidden": torch.randn(2, 2, 3)}, r"student_hidden must have 2 dim.*\[2, 2, 3\]"),
    ({"student_hidden": torch.ones(23, 24).long()}, "student_hidden must be one of.*int64"),
    ({"student_hidden": torch.ones(23, 24).bfloat16()}, "same dtype outside.*bfloat16.*float32"),
    ({"teacher_weight": None}, "teacher_weight must be a torch.Tensor"),
    ({"teacher_hidden": torch.empty(23, 40, device="meta")}, "device"),
    ({"token_weights": torch.ones(3)}, r"token_weights must have shape \[23\], got \[3\]"),
    ({"token_weights": torch.ones(23, requires_grad=True)}, "token_weights.*detach"),
    ({"student_bias": torch.ones(6)}, r"student_bias must have shape \[1003\]"),
    ({"temperature": 0.0}, "temperature must be finite and above 0"),
    ({"temperature": "2"}, "temperature must be a number, got str '2'"),
    ({"student_logit_scale": 0.0}, "student_logit_scale.*not 0, got 0.0"),
    ({"student_logit_scale": 1e39}, "student_logit_scale must be finite and not 0"),
    ({"teacher_logit_scale": None}, "teacher_logit_scale must be a number"),
    ({"teacher_softcap": -1.0}, "teacher_softcap must be None or finite"),
    ({"student_softcap": [30]}, "student_softcap must be a number, got list"),
    ({"label_weight": None}, "label_weight must be a number"),
    ({"labels": [1]}, "labels must be a torch.Tensor, got list"),
    ({"student_ids": [0, 1], "teacher_ids": [0, 1]}, "student_ids must be a torch.Tensor, got li"),
    ({"reduction": "avg"}, "reduction must be one of.*'avg'"),
    ({"plan": "magic"}, "plan must be.*'magic'"),
    ({"impl": "cuda"}, "impl must be one of.*'cuda'"),
    ({"plan": "stash", "reduction": "none"}, "cannot serve reduction='none'"),
    ({"plan": _STASH, "reduction": "none"}, "plan='stash'.*cannot serve reduction='none'"),
    ({"plan": _STASH, "memory_budget": 1 << 20}, "memory_budget must be None with a Plan"),
    ({"memory_budget": 10}, "memory_budget of 10 bytes is too small"),
    ({"memory_budget": -1}, "memory_budget must be a positive"),
    ({"memory_budget": "1GB"}, "memory_budget must be a positive whole number of bytes, got '1GB'"),
    ({"memory_budget": 1.5e9}, "memory_budget must be"),
    ({"group": "world"}, "group must be a torch.distributed process group"),
    ({"compact": "yes"}, "compact must be one of"),
    ({"weight_grad": torch.zeros(1003, 23)}, r"weight_grad must have shape \[1003, 24\]"),
    ({"weight_grad": torch.zeros(1003, 24).half()}, "weight_grad must be float32, got torch.fl"),
    ({"weight_grad": torch.zeros(24, 1003).T}, "weight_grad must be contiguous"),
    ({"weight_grad": torch.zeros(1003, 24, device="meta")}, "device"),
    ({"weight_grad": [0.0]}, "weight_grad must be a torch.Tensor, got list"),
    ({"weight_grad": torch.zeros(1003, 24), "impl": "reference"}, "weight_grad must be None"),
]


@pytest.mark.parametrize(("change", "message"), _WRONG, ids=[message for _, message in _WRONG])
def test_a_call_names_the_argument(change, message):
    names = "student_hidden student_weight teacher_hidden teacher_weight".split()
    arguments = {**dict(zip(names, _tensors(), strict=True)), **change}
    if arguments["student_hidden"].is_floating_point():
        arguments["student_hidden"].requires_grad_()
    with pytest.raises((ValueError, TypeError), match=message):
        linear_divergence(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "reverse"}, "divergence must be one of"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"plan": "stahs"}, "plan must be one of"),
        ({"memory_budget": 0}, "memory_budget must be"),
        ({"temperature": -1.0}, "temperature must be finite and above 0"),
        ({"teacher_softcap": "30"}, "teacher_softcap must be a number"),
        ({"num_classes": 0}, "num_classes must be an integer of at least 1, got 0"),
        ({"group": "world"}, "group must be a torch.distributed process group"),
        ({"temprature": None}, "option 'temprature' .*is unknown"),
        ({"labels": None}, "option 'labels' .*pass it to"),
    ],
    ids=str,
)
def test_a_module_refuses_at_once(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LinearDivergenceLoss(**options)


@pytest.mark.parametrize(
    ("divergence", "arguments", "message"),
    [
        (KLMix, ("0.5", 0.5), "KLMix forward must be a number, got str"),
        *((KLMix, bad, "KLMix weights") for bad in ((-1.0, 1.0), (0.0, 0.0), (torch.inf, 1.0))),
        (JSD, (None,), "beta must be a number, got NoneType"),
        *((JSD, (beta,), "ForwardKL|strictly between") for beta in (0.0, 1.0, -0.1, torch.nan)),
    ],
)
def test_a_divergence_refuses_its_weights(divergence, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        divergence(*arguments)


def test_tensors_without_numbers():
    tensors = [t.to("meta") for t in _tensors()]
    with pytest.raises(ValueError, match="student_hidden must hold numbers, .* meta device"):
        linear_divergence(*tensors)


def test_a_gradient_in_the_memory_of_the_weight():
    tensors = _tensors()
    student_weight = tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="weight_grad must not be the memory of student_weight"):
        linear_divergence(*tensors, weight_grad=student_weight.detach())


def test_a_plan_for_any_way_of_naming_a_device():
    sizes = (64, 1000, 32, 48)
    fp32 = {"dtype": torch.float32}
    by_name = plan_linear_divergence(*sizes, device="cpu", **fp32)
    assert plan_linear_divergence(*sizes, device=torch.device("cpu"), **fp32) == by_name
    index = torch.cuda.current_device() if torch.cuda.is_available() else 1
    assert default_memory_budget(torch.device("cuda", index)) == default_memory_budget("cuda")


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((-1, 1000, 32, 48), {}, "tokens must be an integer of at least 0, got -1"),
        ((64, 0, 32, 48), {}, "classes must be an integer of at least 1, got 0"),
        ((64, 1000, 32.0, 48), {}, "student_dim must be an integer"),
        ((64, 1000, 32, 48), {"reduction": "avg"}, "reduction must be one of"),
        ((64, 1000, 32, 48), {"dtype": torch.int8}, "dtype must be a floating point"),
        ((64, 1000, 32, 48), {"device": "gpu"}, "device must name a device of PyTorch, got 'gpu'"),
    ],
)
def test_a_plan_of_impossible_sizes(sizes, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        plan_linear_divergence(*sizes, **{"device": "cpu", **options})


def test_a_gradient_buffer_without_a_backward():
    tensors = _tensors()
    weight_grad = torch.zeros_like(tensors[1])
    with pytest.raises(ValueError, match="weight_grad is written by the backward pass"):
        linear_divergence(*tensors, weight_grad=weight_grad)
    with torch.no_grad():  # evaluation in a trainer that always passes it
        linear_divergence(*tensors, weight_grad=weight_grad)
    assert not weight_grad.any()


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield torch.compile(linear_divergence, backend="eager", fullgraph=True)
    torch._dynamo.reset()


def test_values_that_a_compiler_could_not_look_at(compiled):
    labels = torch.full((cases.TOKENS,), 1003)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1003\) or be -100, got 1003"):
        compiled(*_tensors(), labels=labels, label_weight=0.5)
    ids = torch.tensor([0, 5000])
    with pytest.raises(ValueError, match=r"teacher_ids must lie in \[0, 1003\)"):
        compiled(*_tensors(), student_ids=torch.tensor([0, 1]), teacher_ids=ids)


def test_a_compiled_call_that_no_stash_can_serve(compiled):
    tensors = _tensors()
    tensors[0].requires_grad_()
    with pytest.raises(Exception, match="cannot serve reduction='none'"):
        compiled(*tensors, plan="stash", reduction="none")


def test_a_compiled_call_without_tokens(compiled):
    hidden, weight, teacher_hidden, teacher_weight = _tensors()
    weight.requires_grad_()
    out = compiled(hidden[:0], weight, teacher_hidden[:0], teacher_weight, reduction="none")
    assert out.loss.shape == (0,)
    out.loss.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


OTHER_MODELS = {
    "classes": ({"classes": 1000}, "plan was made for classes = 1000, and this call has 1003"),
    "depth": ({"student_dim": 32}, "plan was made for student_dim = 32, and this call has 24"),
    "dtype": ({"dtype": torch.bfloat16}, "plan was made for hidden_dtype = torch.bfloat16"),
    "device": ({"device": "cuda"}, "plan was made for device 'cuda', and this call has 'cpu'"),
}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_plan_of_another_model(other, how, compiled):
    changes, message = OTHER_MODELS[other]
    sizes = {"tokens": 23, "classes": 1003, "student_dim": 24, "teacher_dim": 40}
    plan = plan_linear_divergence(
        **{**sizes, "dtype": torch.float32, "device": "cpu", "plan": "recompute", **changes}
    )
    call = compiled if how == "compiled" else linear_divergence
    with pytest.raises(Exception, match=message):
        call(*_tensors(), plan=plan)


def test_a_plan_for_another_number_of_tokens():
    hidden, weight, teacher_hidden, teacher_weight = _tensors()
    plan = plan_linear_divergence(7, 1003, 24, 40, dtype=torch.float32, device="cpu")
    out = linear_divergence(hidden, weight, teacher_hidden, teacher_weight, plan=plan)
    assert torch.equal(out.per_token, linear_divergence(*_tensors()).per_token)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_weight_that_is_no_number(how, bad, compiled):
    weights = torch.ones(cases.TOKENS)
    weights[4] = bad
    call = compiled if how == "compiled" else linear_divergence
    with pytest.raises(ValueError, match=f"token_weights must be finite, got {bad} at position 4"):
        call(*_tensors(), token_weights=weights)


@pytest.mark.parametrize("impl", ["auto", "torch", "triton", "reference"])
def test_a_weight_of_nan_that_nobody_looked_at(impl, monkeypatch):
    """As on a GPU: the loss is NaN, and not a number that looks right."""
    monkeypatch.setattr(shared_arguments, "can_read_values", lambda tensor: False)
    weights = torch.ones(cases.TOKENS, device=cases.DEVICE)
    weights[4] = torch.nan
    tensors = cases.random_pair(torch.float32).tensors
    out = linear_divergence(*tensors, token_weights=weights, impl=impl, compact=False)
    assert out.loss.isnan() and out.per_token.isfinite().all()


@pytest.mark.parametrize("impl", ["auto", "torch", "triton", "reference"])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_a_negative_weight_turns_the_gradient_round(plan, impl):
    """The sum is of -w times the divergence: away from the teacher."""
    tensors = cases.random_pair(torch.float32).tensors
    results = []
    for sign in (1.0, -1.0):
        hidden, weight = (x.detach().clone().requires_grad_() for x in tensors[:2])
        weights = sign * torch.linspace(0.5, 1.5, cases.TOKENS)
        out = linear_divergence(
            hidden, weight, *tensors[2:], token_weights=weights, plan=plan, impl=impl
        )
        out.loss.backward()
        results.append((out.loss, hidden.grad, weight.grad))
    assert results[0][1].norm() > 0
    for ours, turned in zip(*results, strict=True):
        torch.testing.assert_close(ours, -turned, rtol=1e-6, atol=1e-7)


def test_a_head_without_columns():
    hidden, weight = torch.zeros(3, 0), torch.zeros(5, 0)
    teacher, teacher_weight = torch.zeros(3, 4), torch.zeros(5, 4)
    message = "hidden and .*weight must have at least one column, got 0"
    with pytest.raises(ValueError, match=f"student_{message}"):
        linear_divergence(hidden, weight, teacher, teacher_weight)
    with pytest.raises(ValueError, match=f"teacher_{message}"):
        linear_divergence(teacher, teacher_weight, hidden, weight)
    with pytest.raises(ValueError, match=message):
        token_logprob(hidden, weight, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        sample_from_hidden(hidden, weight, SampleKeys(0, torch.arange(3), 0))


@pytest.mark.parametrize("impl", ["auto", "torch", "triton", "reference"])
@pytest.mark.parametrize("plan", ["stash", "recompute"])
def test_a_logit_that_leaves_the_range_of_fp32(plan, impl):
    """3e38 / 0.7 is infinite: its row is NaN, as the softmax of such logits, and no other."""
    tensors = [x.clone() for x in cases.random_pair(torch.float32).tensors]
    tensors[1][:, 0] = 0.0
    tensors[1][7, 0] = 1.0
    clean = linear_divergence(*tensors, temperature=0.7, plan=plan, impl=impl)
    tensors[0][2, 0] = 3e38
    out = linear_divergence(*tensors, temperature=0.7, plan=plan, impl=impl)
    others = torch.arange(cases.TOKENS, device=cases.DEVICE) != 2
    assert out.per_token[2].isnan() and out.loss.isnan()
    assert torch.equal(out.per_token[others], clean.per_token[others])
    within = linear_divergence(*tensors, temperature=1.0, plan=plan, impl=impl)
    assert within.loss.isfinite()
