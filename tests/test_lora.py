"""LoRA: dropout, checkpointing, a teacher on the same base, resume and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from esr_train.adapters import load_adapter
from esr_train.cli import main
from esr_train.config import Config, to_yaml
from esr_train.models import share_weights, training_mode
from tests.test_checkpoint import curve
from tests.test_train import build, losses
from tests.tiny import MakeConfig, tiny_llama

LORA = {"r": 4, "alpha": 8.0}


def lora_config(make_config: MakeConfig, **changes: Any) -> Config:
    """A LoRA with dropout, whose teacher is the student's base with another adapter or none."""
    base = make_config().student.model
    return make_config(
        **{
            "student": {"model": base, "lora": {**LORA, "dropout": 0.2}},
            "optim__schedule": "constant",
            "optim__micro_batch": 3,
            "steps": 4,
            **changes,
        }
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_two_and_two_steps_of_lora_are_four(
    make_config: MakeConfig, tmp_path: Path, checkpointing: bool
) -> None:
    changes = {"runtime__gradient_checkpointing": checkpointing}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    build(lora_config(make_config, **changes), whole, save=True).run()
    build(lora_config(make_config, steps=2, **changes), parts, save=True).run()
    torch.rand(7)  # no generator's state matters
    build(lora_config(make_config, **changes), parts, save=True).run()
    assert curve(parts) == curve(whole) and len(curve(whole)) == 4
    path = "checkpoints/step_000004"
    for file in ("model/adapter_model.safetensors", "optimizer.safetensors"):
        assert (parts / path / file).read_bytes() == (whole / path / file).read_bytes()
    names = {p.name for p in (whole / path / "model").iterdir()}
    assert "model.safetensors" not in names, "the adapter alone is stored"


def test_dropout_is_on_in_training_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    curves = []
    for dropout in (0.0, 0.5):
        lora = {**LORA, "dropout": dropout}
        config = lora_config(make_config, student__lora=lora, steps=2, eval__every=0)
        trainer = build(config, tmp_path / str(dropout))
        trainer.run()
        curves.append(curve(tmp_path / str(dropout)))
    # B is zero at first: the same rollout and loss; but not the same gradient.
    assert curves[0][0]["loss"] == curves[1][0]["loss"]
    assert curves[0][0]["grad_norm"] != curves[1][0]["grad_norm"]
    ids = torch.tensor([[3, 4, 5, 6]])
    assert not any(module.training for module in trainer.student.modules())
    assert torch.equal(trainer.student(ids).logits, trainer.student(ids).logits)
    with training_mode(trainer.student):
        assert not torch.equal(trainer.student(ids).logits, trainer.student(ids).logits)
    with pytest.raises(KeyError), training_mode(trainer.student):
        raise KeyError
    assert not any(module.training for module in trainer.student.modules())


def test_checkpointed_layers_have_the_gradient_of_plain_ones(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """For LoRA with dropout, where the recomputation must draw the same masks."""
    for full in (False, True):
        curves = []
        for on in (False, True):
            directory = tmp_path / f"{full}{on}"
            changes: dict[str, Any] = {"runtime__gradient_checkpointing": on, "eval__every": 0}
            if full:
                changes["student__lora"] = None
            trainer = build(lora_config(make_config, **changes), directory)
            recomputed = []
            trainer.student.get_decoder().layers[0].mlp.register_forward_pre_hook(
                lambda *_, seen=recomputed: seen.append(torch.is_grad_enabled())
            )
            trainer.run()
            curves.append((curve(directory), sum(recomputed)))
        assert curves[0][0] == curves[1][0]
        assert curves[1][1] > curves[0][1], "nothing was recomputed"


@pytest.fixture(scope="session")
def teacher_adapter(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter for the base of the students, none of its weights zero."""
    model = AutoModelForCausalLM.from_pretrained(make_config().student.model)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, settings).save_pretrained(path)
    return str(path)


def storages(*models: Any) -> set[int]:
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def start_apart(student: Any) -> None:
    """Before the first step an adapter adds nothing, and a base teaches itself nothing."""
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.02)


@pytest.mark.parametrize("adapted", [False, True], ids=["the base", "an adapter on the base"])
def test_a_teacher_on_the_base_of_the_student_shares_its_weights(
    make_config: MakeConfig, tmp_path: Path, teacher_adapter: str, adapted: bool
) -> None:
    base_path = make_config().student.model
    teacher = {"model": base_path, "adapter": teacher_adapter if adapted else None}
    config = lora_config(make_config, teacher=teacher, runtime__gradient_checkpointing=True)
    trainer = build(config, tmp_path)
    student, shared = trainer.student, trainer.objective.teacher.model
    base: Any = AutoModelForCausalLM.from_pretrained(base_path)
    adapters = [p for m in (student, shared) for n, p in m.named_parameters() if "lora_" in n]
    # No tensor of the two is there twice, and the trainer keeps no copy of any either.
    assert len(storages(student, shared)) == len(storages(base)) + len({*map(id, adapters)})
    start_apart(student)
    trainer.run()
    assert len(storages(student, shared)) == len(storages(base)) + len({*map(id, adapters)})

    # Alone, the teacher is the same: nothing of the student's adapter reaches it, or the reverse.
    alone = load_adapter(base, teacher_adapter) if adapted else base
    ids = torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(shared(ids).logits, alone(ids).logits)
    assert not torch.allclose(shared(ids).logits, student(ids).logits, atol=1e-3)
    text = trainer.objective.teacher.rollout.generate([[3, 4], [5]], 2, 6, 0.0, (0,))
    for row, prompt in enumerate(text.prompts):
        made = alone.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert made[0, len(prompt) :].tolist() == text.response(row)

    # And a run with two copies is the same run.
    copied = Path(tmp_path / "copy")
    for file in Path(base_path).iterdir():
        copied.mkdir(exist_ok=True)
        (copied / file.name).write_bytes(file.read_bytes())
    apart = lora_config(
        make_config,
        teacher={**teacher, "model": str(copied)},
        runtime__gradient_checkpointing=True,
    )
    other = build(apart, tmp_path / "apart")
    assert len(storages(other.student, other.objective.teacher.model)) > len(
        storages(student, shared)
    )
    start_apart(other.student)
    other.run()
    assert curve(tmp_path / "apart") == curve(tmp_path)


def test_models_that_share_weights_differ_in_modules_alone() -> None:
    first = tiny_llama()
    second = share_weights(first)
    assert storages(first) == storages(second)
    second.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(first(ids).logits, tiny_llama()(ids).logits)
    assert not torch.equal(first(ids).logits, second(ids).logits)


def test_an_adapter_is_exported_merged_and_not(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(to_yaml(lora_config(make_config, steps=2)))
    assert main(["train", str(path), "--out", str(run)]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "adapter")]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "merged"), "--merge"]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "best"), "--best"]) == 0
    ids = torch.tensor([[3, 4, 5, 6]])
    base = AutoModelForCausalLM.from_pretrained(make_config().student.model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = adapted(ids).logits
        torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids).logits, logits, atol=1e-3)
    assert (tmp_path / "best" / "adapter_model.safetensors").is_file()

    # A directory that holds an adapter is a model to `evaluate`; `train` says what to do with one.
    capsys.readouterr()
    assert main(["evaluate", str(path), "--model", str(tmp_path / "adapter")]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert main(["evaluate", str(path), "--model", str(tmp_path / "merged")]) == 0
    assert found == pytest.approx(json.loads(capsys.readouterr().out)["metrics"], rel=1e-3)
    command = ["train", str(path), f"student.model={tmp_path / 'adapter'}", "--out"]
    assert main([*command, str(tmp_path / "refused")]) == 2
    assert "is an adapter itself; merge it by export" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "merged")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(run), "--out", str(tmp_path / "x"), "--arm", "full"]) == 2
    assert "may be those of train/seed0" in capsys.readouterr().err


@pytest.mark.slow  # tracing takes minutes on a slow CPU
def test_compiled_forward_passes_train_alike(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and run by PyTorch's own operators, which needs no compiler."""
    real, traced = torch.compile, []

    def trace(module: Any, **options: Any) -> Any:
        traced.append(module)
        return real(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)
    for on in (False, True):
        changes = {"runtime__compile": on, "eval__every": 0, "steps": 2}
        trainer = build(lora_config(make_config, **changes), tmp_path / str(on))
        trainer.run()
    assert len(traced) == 2, "student and teacher"
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


def test_an_adapter_on_a_model_without_some_layers_is_exported_merged_only(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"student__drop_layers": [0], "steps": 1, "eval__every": 0}
    path, run, out = tmp_path / "config.yaml", tmp_path / "run", tmp_path / "out"
    path.write_text(to_yaml(lora_config(make_config, **changes)))
    assert main(["train", str(path), "--out", str(run)]) == 0
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "without layers [0], which no other tool would drop: use --merge" in (
        capsys.readouterr().err
    )
    assert main(["export", str(run), "--out", str(out), "--merge"]) == 0
    assert len(AutoModelForCausalLM.from_pretrained(out).model.layers) == 1
