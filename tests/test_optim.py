"""Gradients, masters and the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esr_train.metrics import Spans
from esr_train.models import ModelError
from esr_train.optim import Optimizer
from tests.test_train import build
from tests.tiny import MakeConfig, save_pair


def bf16_linear(value: float = 1.0) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_bf16_weights_are_trained_by_fp32_masters() -> None:
    """A hundred updates of 1e-4, each of which bf16 would round away, add up in the master."""
    model = bf16_linear()
    optimizer = Optimizer(model)
    for _ in range(100):
        model.weight.sum().backward()
        optimizer.step(1e-4)
    assert optimizer.masters["weight"].item() == pytest.approx(0.99, abs=1e-4)
    assert model.weight.item() == pytest.approx(0.99, abs=4e-3) and model.weight.item() < 1
    assert optimizer.masters["weight"].dtype == torch.float32


def test_micro_batches_add_up_in_fp32() -> None:
    """Behind a gradient of 1, bf16 would lose 256 gradients of 1/256 one by one."""
    model = bf16_linear()
    optimizer = Optimizer(model)
    for factor in (1.0, *[1 / 256] * 256):
        (model.weight * factor).sum().backward()
        assert model.weight.grad is None, "16-bit gradients are not kept"
    assert optimizer.clip().item() == 2.0
    optimizer.zero_grad()
    assert optimizer.masters["weight"].grad is None


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_updates_are_adamws_and_the_same_on_any_number_of_threads(threads) -> None:
    start, *gradients = torch.randn(4, 257, 131, generator=torch.Generator().manual_seed(0))
    results = []
    for number in (1, 2):
        threads(number)
        model = torch.nn.Linear(131, 257, bias=False)
        model.weight.data.copy_(start)
        optimizer = Optimizer(model)
        for gradient in gradients:
            model.weight.grad = gradient.clone()
            optimizer.step(1e-2)
        results.append(model.weight.detach())
    weight = start.double()
    mean = square = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.double() ** 2
        spread = (square / (1 - 0.999**step)).sqrt() + 1e-8
        weight = weight - 1e-2 * mean / (1 - 0.9**step) / spread
    torch.testing.assert_close(results[0].double(), weight, rtol=0, atol=1e-6)
    assert torch.equal(*results)


def test_a_closed_optimizer_takes_no_gradients() -> None:
    model = bf16_linear()
    first, second = Optimizer(model), Optimizer(model)
    first.close()
    model.weight.sum().backward()
    assert first.masters["weight"].grad is None
    assert second.masters["weight"].grad is not None


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_the_gradient_of_a_bf16_model_is_rounded_once(
    make_config: MakeConfig, tmp_path: Path, tied: bool
) -> None:
    """Against the same weights in fp32. In one micro-batch: a sum of several hides rounding."""
    path = save_pair(tmp_path / "student", seed=5, tie_word_embeddings=tied)
    gradients, batch = [], None
    for dtype in ("bfloat16", "float32"):
        config = make_config(
            student__model=path,
            teacher__model=path,
            runtime__dtype=dtype,
            rollout__prompts=16,
            loss__divergence="forward_kl",
            eval__every=0,
        )
        trainer = build(config, tmp_path / "run")
        with torch.no_grad():  # so that the teacher is another model
            for parameter in trainer.student.parameters():
                parameter.copy_((parameter * 0.5).bfloat16())
        for name, master in trainer.optimizer.masters.items():
            master.data.copy_(trainer.optimizer.parameters[name])
        if batch is None:
            batch = trainer.rollout.generate(trainer.prompts.prompts_for(1), 2, 6, 1.0, (0,))
        trainer._gradient(1, batch, Spans())
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        gradients.append({k: master.grad for k, master in trainer.optimizer.masters.items()})
    ours, exact = gradients
    assert ours.keys() == exact.keys()
    for key in exact:
        assert ours[key].dtype == torch.float32
        error = (ours[key] - exact[key]).norm() / exact[key].norm()
        assert error < 0.05, f"{key}: {error:.3f}"
    head: Any = ours[name]
    assert not torch.equal(head, head.bfloat16().float()), "the head's gradient was rounded"


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ModelError, match="no trainable weights"):
        Optimizer(bf16_linear().requires_grad_(False))


def test_betas_of_the_configuration_reach_adamw(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = build(make_config(optim__betas=[0.8, 0.95]), tmp_path / "run")
    assert [group["betas"] for group in trainer.optimizer.adamw.param_groups] == [(0.8, 0.95)]
