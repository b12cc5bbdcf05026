"""What is refused of adapters, and said where."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from esr_train.adapters import AdapterError, load_adapter
from esr_train.config import ModelConfig, RuntimeConfig
from esr_train.experiment import load_experiment
from esr_train.models import ModelError, load_model
from tests.test_lora import LORA, lora_config
from tests.tiny import MakeConfig, char_tokenizer, tiny_llama

ADAPTED = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(**ADAPTED)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (["nothing"], AdapterError, "student.lora: .*nothing.* not found in the base model"),
        (["q_proj", "lm_head"], ModelError, "remove the head from target_modules"),
    ],
)
def test_layers_that_get_no_adapter_are_named(
    make_config: MakeConfig, targets: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_experiment(lora_config(make_config, student__lora={**LORA, "target_modules": targets}))


def test_adapters_without_peft_are_an_error_that_says_what_to_install(
    make_config: MakeConfig, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(make_config)
    monkeypatch.setitem(sys.modules, "peft", None)
    load_experiment(make_config())  # nothing else needs it
    with pytest.raises(AdapterError, match=r"student.lora: needs peft: .*esr-distill\[lora\]"):
        load_experiment(config)
    with pytest.raises(AdapterError, match=r"adapter .*: needs peft"):
        load_adapter(tiny_llama(), str(adapter))


def test_an_adapter_is_for_a_model_wherever_its_files_are(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "someone/model"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_adapter(tiny_llama(), str(adapter))


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"shape \[2, 48\] in the model, \[2, 32\] in the file"):
        load_adapter(tiny_llama(hidden_size=48), str(adapter))
    with pytest.raises(AdapterError, match=r"layers.1.* shape None in the model, \[2, 32\] in"):
        load_adapter(tiny_llama(num_hidden_layers=1), str(adapter))
    with pytest.raises(AdapterError, match=r"layers.2.* shape \[2, 32\] in the model, None in"):
        load_adapter(tiny_llama(num_hidden_layers=3), str(adapter))


def test_a_pickled_adapter_is_not_read(adapter: Path) -> None:
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load_adapter(tiny_llama(), str(adapter))


def test_a_pickled_model_is_not_read(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(make_config().student.model, path)
    (path / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(ModelConfig(model=str(path)), RuntimeConfig())


@pytest.mark.parametrize("path", ["/nowhere/adapter", "./nowhere", "nowhere"])
def test_a_missing_adapter_is_named(path: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter {path!r}: no such directory"):
        load_adapter(tiny_llama(), path)


def test_a_teacher_has_one_adapter(make_config: MakeConfig, adapter: Path) -> None:
    char_tokenizer().save_pretrained(adapter)
    path = adapter / "adapter_config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    path.write_text(
        json.dumps({**settings, "base_model_name_or_path": make_config().student.model})
    )
    teacher = {"model": str(adapter), "adapter": str(adapter)}
    with pytest.raises(ModelError, match="is an adapter itself; name its base"):
        load_experiment(make_config(teacher=teacher))


def test_layers_are_dropped_from_a_student_and_not_from_the_teacher_that_shares_them(
    make_config: MakeConfig,
) -> None:
    base = make_config().student.model
    changes = {"student__drop_layers": [0], "teacher__model": base}
    experiment = load_experiment(lora_config(make_config, **changes))
    student, teacher = experiment.student.model, experiment.teacher.model
    assert (len(student.get_decoder().layers), len(teacher.get_decoder().layers)) == (1, 2)
    [kept] = student.get_decoder().layers
    shared = teacher.get_decoder().layers[1].mlp.up_proj.weight
    assert kept.mlp.up_proj.base_layer.weight is shared
