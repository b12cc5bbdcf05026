"""What `--dry-run` predicts, against runs; what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Gemma2Config, Gemma2ForCausalLM

from esr_train.activations import saved_bytes
from esr_train.adapters import AdapterError
from esr_train.config import ConfigError
from esr_train.dry_run import ASSUMED_PROMPT, describe, make_plan
from esr_train.estimate import Memory, memory, step_seconds
from esr_train.metrics import Spans
from esr_train.models import ModelError
from esr_train.rollout import ContextError
from tests.test_train import build
from tests.tiny import SETTINGS, MakeConfig, save_pair, tiny_llama

LORA = {"r": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora", "shared"])
def test_bytes_of_weights_masters_moments_and_gradients_are_exact(
    make_config: MakeConfig, tmp_path: Path, kind: str, dtype: str
) -> None:
    config = make_config(runtime__dtype=dtype, eval__every=0)
    student: dict[str, Any] = {"model": config.student.model}
    if kind != "full":
        student["lora"] = LORA
    teacher = student["model"] if kind == "shared" else config.teacher.model
    config = make_config(
        runtime__dtype=dtype, student=student, teacher__model=teacher, eval__every=0, steps=1
    )
    found = memory(config, make_plan(config, "cpu"))
    trainer = build(config, tmp_path)
    batch = trainer.rollout.generate(trainer.prompts.prompts_for(1), 2, 6, 1.0, (0,))
    trainer._gradient(1, batch, Spans())
    masters = trainer.optimizer.masters
    assert found.gradients == sum(m.grad.nbytes for m in masters.values() if m.grad is not None)
    trainer.run()
    models = trainer.student, trainer.objective.teacher.model
    weights = {p.data_ptr(): p.nbytes for model in models for p in model.parameters()}
    assert found.weights == sum(weights.values())
    own = {id(p) for p in trainer.optimizer.parameters.values()}
    assert found.masters == sum(m.nbytes for m in masters.values() if id(m) not in own)
    assert (found.masters > 0) == (kind == "full" and dtype == "bfloat16")
    state = trainer.optimizer.state_tensors().items()
    assert found.optimizer == sum(t.nbytes for name, t in state if name.startswith("adamw/"))


def really_saved(model: Any, rows: int, width: int) -> int:
    """Bytes that autograd keeps of a forward pass with memory."""
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(rows, width, dtype=torch.int64)
        out = model.get_decoder()(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        )
        alive.append(out.last_hidden_state)
    return sum(found.values())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_saved_activations_are_those_of_a_forward_pass(kind: str) -> None:
    settings = SETTINGS | {"num_hidden_layers": 3}

    def make() -> nn.Module:
        if kind == "llama":
            return tiny_llama(num_hidden_layers=3)
        return Gemma2ForCausalLM(Gemma2Config(**settings, head_dim=8)).eval()

    model = make()
    with torch.device("meta"):
        found = saved_bytes(make(), 4, 40)
    # Keys and values are counted for all heads, as some kernels want them.
    assert 1.0 <= found / really_saved(model, 4, 40) < 1.2


def test_the_predicted_peak_of_training_is_near_a_measured_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Resident memory that a step adds to loaded models, where activations are most of it."""
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    path = save_pair(tmp_path / "model", 0, **sizes)
    config = make_config(
        student__model=path,
        teacher__model=path,
        rollout__prompts=24,
        rollout__samples=2,
        rollout__max_new_tokens=100,
        eval__every=0,
        steps=2,
    )
    plan = make_plan(config, "cpu")
    predicted = memory(config, plan)
    trainer = build(config, tmp_path / "run")
    # No answer ends, so that all are as long as the prediction has them.
    trainer.rollout.eos_ids = trainer.rollout._extra_stop_ids = []
    rows: list[dict[str, Any]] = []
    trainer.on_step = lambda row, _: rows.append(row)
    trainer.run()
    peaks = rows[-1]["peak_bytes"]
    if peaks["student"] is None:
        pytest.skip("the resident high-water mark cannot be reset here")
    added = peaks["student"] - peaks["teacher"]
    expected = predicted.activations + predicted.loss + predicted.gradients
    assert rows[-1]["tokens"] == 4800
    assert 0.5 < added / expected < 2


def test_a_dry_run_reads_no_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    bare = {}
    for who in ("student", "teacher"):
        source = getattr(make_config(), who).model
        shutil.copytree(source, tmp_path / who)
        (tmp_path / who / "model.safetensors").unlink()
        bare[f"{who}__model"] = str(tmp_path / who)
    text = describe(make_config(**bare))
    with_weights = describe(make_config())
    assert text == with_weights and "predicted GiB" in text


def test_data_of_the_hub_is_not_read(make_config: MakeConfig, tmp_path: Path) -> None:
    path = save_pair(tmp_path / "long", max_position_embeddings=512)
    config = make_config(student__model=path, teacher__model=path, data__task="openai/gsm8k")
    text = describe(config, "a100")
    assert f"prompts of {ASSUMED_PROMPT} tokens (an assumption: data not read)" in text
    assert "NVIDIA A100" in text and "torch.bfloat16" in text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss__divergence": "revers_kl"}, ConfigError, "loss.divergence: "),
        ({"rollout__max_new_tokens": 117}, ContextError, "rollout with 117 new tokens after"),
        ({"eval__max_new_tokens": 120}, ContextError, "eval with 120 new tokens"),
        ({"student__model": "/nowhere"}, ModelError, "no such directory"),
        ({"student__drop_layers": [7]}, ModelError, "drop_layers"),
        ({"student__lora": {"target_modules": ["q_poj"]}}, AdapterError, "q_poj"),
        ({"student__lora": {"target_modules": ["lm_head"]}}, ModelError, "the head cannot"),
        ({"tracking__trackers": ["wandb"]}, ConfigError, "pip install wandb"),
        ({"data__task": "sumz"}, ConfigError, "data.task: "),
        ({"data__task": "a/b", "data__grader": "mth"}, ConfigError, "data.grader: got 'mth'"),
        ({"data__task": "prompts", "eval__problems": 999}, ConfigError, "eval.problems: .*got 999"),
        ({"data__task": "nowhere.jsonl"}, ConfigError, "is not a file"),
    ],
)
def test_it_refuses_what_the_run_would_refuse(
    make_config: MakeConfig, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = make_config(**changes)
    with pytest.raises(error, match=message):
        describe(config)


def test_an_arm_that_does_not_fit_is_named(make_config: MakeConfig) -> None:
    arms = [{"name": "short", "max_new_tokens": 4}, {"name": "long", "max_new_tokens": 90}]
    assert "\nlong: 3 steps" in describe(make_config(arms=arms))
    too_long = [*arms, {"name": "x", "max_new_tokens": 200}]
    with pytest.raises(ContextError, match="rollout with 200"):
        describe(make_config(arms=too_long))


def test_shorter_rollouts_and_smaller_micro_batches_take_less(make_config: MakeConfig) -> None:
    base: dict[str, Any] = {"rollout__prompts": 16, "rollout__max_new_tokens": 64}

    def found(**changes: Any) -> tuple[Memory, float]:
        config = make_config(**base | changes)
        plan = make_plan(config, "h100")
        return memory(config, plan), sum(step_seconds(config, plan).values())

    whole, seconds = found()
    short, less = found(rollout__max_new_tokens=16)
    assert short.peak < whole.peak and less < 0.5 * seconds
    parts, same = found(optim__max_tokens=320)
    assert parts.activations < 0.3 * whole.activations and same == pytest.approx(seconds)
    again, slower = found(runtime__gradient_checkpointing=True)
    assert again.activations < 0.8 * whole.activations and slower > seconds
    assert found(rollout__max_tokens_in_flight=100)[0].keys_values < whole.keys_values


def test_the_peak_is_that_of_the_larger_phase() -> None:
    sizes = {"weights": 1, "masters": 2, "optimizer": 3, "gradients": 4, "activations": 5}
    common: dict[str, Any] = {**sizes, "loss": 6, "evaluation": 8}
    assert Memory(**common, keys_values=7, keeps_keys=True).peak == 6 + 15 + 7
    assert Memory(**common, keys_values=7, keeps_keys=False).peak == 6 + 15
    assert Memory(**common, keys_values=70, keeps_keys=False).peak == 6 + 70
    common["evaluation"] = 80
    assert Memory(**common, keys_values=70, keeps_keys=True).peak == 6 + 15 + 70
    assert Memory(**common, keys_values=7, keeps_keys=True).peak == 6 + 80


def test_the_text_says_that_it_is_predicted_and_for_what(make_config: MakeConfig) -> None:
    text = describe(make_config(), "mi300x")
    assert text.startswith("predicted for AMD Instinct MI300X 192 GB, torch.bfloat16")
    assert "predicted seconds a step" in text
