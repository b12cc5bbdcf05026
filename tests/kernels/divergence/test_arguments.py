"""Arguments that no call could use: refused by name, eagerly and in a compiled graph."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import (
    JSD,
    KLMix,
    LinearDivergenceLoss,
    default_memory_budget,
    linear_divergence,
    plan_linear_divergence,
)
from tests.kernels import cases


def _tensors() -> list[torch.Tensor]:
    """On the CPU, where values of ids and labels are looked at."""
    return [tensor.cpu() for tensor in cases.random_pair(torch.float32).tensors]


WRONG_OPTIONS = {
    "temperature": ({"temperature": "2"}, TypeError, "temperature must be a number, got str '2'"),
    "softcap": ({"student_softcap": [30]}, TypeError, "student_softcap must be a number, got list"),
    "scale beyond fp32": (
        {"student_logit_scale": 1e39},
        ValueError,
        "student_logit_scale must be finite and not 0",
    ),
    "no scale": ({"teacher_logit_scale": None}, TypeError, "teacher_logit_scale must be a number"),
    "label weight": ({"label_weight": None}, TypeError, "label_weight must be a number"),
    "budget": (
        {"memory_budget": "1GB"},
        ValueError,
        "memory_budget must be a positive whole number of bytes, got '1GB'",
    ),
    "fraction of a byte": ({"memory_budget": 1.5e9}, ValueError, "memory_budget must be"),
    "ids": (
        {"student_ids": [0, 1], "teacher_ids": [0, 1]},
        TypeError,
        "student_ids must be a torch.Tensor, got list",
    ),
    "labels": ({"labels": [1]}, TypeError, "labels must be a torch.Tensor, got list"),
    "classes": ({"num_classes": True}, ValueError, "num_classes must be an integer"),
    "group": ({"group": "world"}, TypeError, "group must be a torch.distributed process group"),
    "compact": ({"compact": "yes"}, ValueError, "compact must be one of"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_an_option_of_the_wrong_kind(name):
    options, error, message = WRONG_OPTIONS[name]
    with pytest.raises(error, match=message):
        linear_divergence(*_tensors(), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "reverse"}, ValueError, "divergence must be one of"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"plan": "stahs"}, ValueError, "plan must be one of"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and above 0"),
        ({"teacher_softcap": "30"}, TypeError, "teacher_softcap must be a number"),
        ({"num_classes": 0}, ValueError, "num_classes must be an integer of at least 1, got 0"),
        ({"group": "world"}, TypeError, "group must be a torch.distributed process group"),
    ],
)
def test_a_module_refuses_at_once(options, error, message):
    with pytest.raises(error, match=message):
        LinearDivergenceLoss(**options)


def test_a_divergence_refuses_what_is_no_number():
    with pytest.raises(TypeError, match="KLMix forward must be a number, got str"):
        KLMix("0.5", 0.5)
    with pytest.raises(TypeError, match="beta must be a number, got NoneType"):
        JSD(None)


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
    assert default_memory_budget(torch.device("cuda", 1)) == default_memory_budget("cuda")
    with pytest.raises(ValueError, match="device must name a device of PyTorch, got 'gpu'"):
        plan_linear_divergence(*sizes, device="gpu")


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ((-1, 1000, 32, 48), {}, ValueError, "tokens must be an integer of at least 0, got -1"),
        ((64, 0, 32, 48), {}, ValueError, "classes must be an integer of at least 1, got 0"),
        ((64, 1000, 32.0, 48), {}, ValueError, "student_dim must be an integer"),
        ((64, 1000, 32, 48), {"reduction": "avg"}, ValueError, "reduction must be one of"),
        (
            (64, 1000, 32, 48),
            {"dtype": torch.int8},
            TypeError,
            "dtype must be a floating point",
        ),
    ],
)
def test_a_plan_of_impossible_sizes(sizes, options, error, message):
    with pytest.raises(error, match=message):
        plan_linear_divergence(*sizes, device="cpu", **options)


def test_a_budget_beside_a_plan():
    plan = plan_linear_divergence(23, 1003, 24, 40, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="memory_budget must be None with a Plan"):
        linear_divergence(*_tensors(), plan=plan, memory_budget=1 << 20)


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
