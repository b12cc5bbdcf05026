"""Calls that are like an earlier one: what they skip, and that they refuse as much."""

from __future__ import annotations

import os
from decimal import Decimal

import pytest
import torch

from esr_kernels import linear_divergence
from esr_kernels.divergence import arguments, call, op
from tests.kernels import cases
from tests.kernels.divergence.test_arguments import _WRONG

pytestmark = pytest.mark.kernels
NAMES = "student_hidden student_weight teacher_hidden teacher_weight".split()
TOKENS, CLASSES = 5, 37
values_are_read = pytest.mark.skipif(
    os.environ.get("ESR_TRITON_ON_CPU") == "1",
    reason="under the sanitizer CPU tensors pass for a GPU's, whose values no check reads",
)


@pytest.fixture(autouse=True)
def _nothing_seen():
    call._calls.clear()
    yield
    call._calls.clear()


@pytest.fixture
def checks(monkeypatch):
    """Counts the calls that are checked in full."""
    count = [0]

    def check_inputs(*args):
        count[0] += 1
        return arguments.check_inputs(*args)

    monkeypatch.setattr(op, "check_inputs", check_inputs)
    return count


def _arguments(dtype=torch.float32, **options):
    random = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, 8), (CLASSES, 8), (TOKENS, 16), (CLASSES, 16))
    tensors = [torch.randn(*size, generator=random).to(cases.DEVICE, dtype) for size in sizes]
    tensors[0].requires_grad_()
    return {**dict(zip(NAMES, tensors, strict=True)), "impl": "triton", **options}


def test_a_call_like_another_is_checked_once(checks):
    first = linear_divergence(**_arguments())
    again = linear_divergence(**_arguments())
    assert checks == [1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_a_call_like_another():
    grads = []
    for _ in range(2):
        given = _arguments(torch.bfloat16)
        given["student_weight"].requires_grad_()
        linear_divergence(**given).loss.backward()
        grads.append((given["student_hidden"].grad, given["student_weight"].grad))
    assert len(call._calls) == 1 and grads[0][1].norm() > 0
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


def test_weights_and_labels_of_another_call(checks, monkeypatch):
    """As on a GPU, where the host reads no values: those of each call count, at any stride."""
    place = torch.device(cases.DEVICE).type
    monkeypatch.setattr(call, "_VALUES_ARE_READ_ON", ())
    monkeypatch.setattr(arguments, "can_read_values", lambda tensor: False)
    losses = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        weights = torch.rand(2 * TOKENS, generator=random).to(place)[::2]
        labels = torch.randint(5, (TOKENS,), generator=random).to(place)
        options = {"token_weights": weights, "labels": labels, "label_weight": 0.5}
        ours = linear_divergence(**_arguments(compact=False, **options)).loss
        losses.append(ours)
        reference = linear_divergence(**{**_arguments(**options), "impl": "reference"}).loss
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=0)
    assert losses[0] != losses[1] and checks == [4]  # once, and each of the reference's


@values_are_read
def test_bad_calls_after_a_good_one():
    tensors = cases.random_pair(torch.float32).tensors
    good = {**dict(zip(NAMES, tensors, strict=True)), "impl": "triton"}
    linear_divergence(**good)
    for change, message in _WRONG:
        assert len(call._calls) == 1
        with pytest.raises((ValueError, TypeError), match=message):
            linear_divergence(**{**good, **_on_the_device(change)})


def _on_the_device(change):
    return {
        name: x.to(cases.DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x
        for name, x in change.items()
    }


@pytest.mark.parametrize(
    "option, good, bad",
    [("num_classes", 1, True), ("temperature", 2.0, Decimal(2)), ("label_weight", 0, Decimal(0))],
    ids=str,
)
def test_an_option_that_equals_a_good_one(option, good, bad):
    linear_divergence(**_arguments(**{option: good}))
    with pytest.raises((ValueError, TypeError), match=f"{option} must be"):
        linear_divergence(**_arguments(**{option: bad}))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 2.0},
        {"num_classes": 30},
        {"plan": "recompute"},
        {"memory_budget": 1 << 30},
        {"teacher_softcap": 20.0},
        {"divergence": "forward_kl"},
        {"reduction": "mean"},
    ],
    ids=str,
)
def test_another_option_is_another_call(checks, change):
    linear_divergence(**_arguments())
    out = linear_divergence(**_arguments(**change))
    call._calls.clear()
    assert checks == [2]
    assert torch.equal(out.loss, linear_divergence(**_arguments(**change)).loss)


def test_gradients_are_part_of_a_call(checks):
    linear_divergence(**_arguments())
    with torch.no_grad():
        assert not linear_divergence(**_arguments()).loss.requires_grad
    linear_divergence(**_arguments())
    assert checks == [2]


def test_a_warning_is_given_every_time():
    given = _arguments()
    given["teacher_weight"] = given["teacher_weight"][:20]
    for _ in range(2):
        with pytest.warns(UserWarning, match="student_weight has 37 rows"):
            linear_divergence(**given)


@values_are_read
def test_values_on_the_cpu_are_read_every_time():
    given = {name: tensor.cpu() for name, tensor in _arguments().items() if name in NAMES}
    weights = torch.ones(TOKENS)
    linear_divergence(**given, token_weights=weights)
    weights[3] = torch.nan
    with pytest.raises(ValueError, match="token_weights must be finite"):
        linear_divergence(**given, token_weights=weights)


@values_are_read
def test_calls_on_the_cpu_are_not_kept():
    given = {name: tensor.cpu() for name, tensor in _arguments().items() if name in NAMES}
    linear_divergence(**given)
    assert not call._calls
