"""Where a frozen teacher is. tests/test_distributed.py has teachers in parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig

from esr_kernels import linear_divergence
from esr_train.config import ConfigError
from esr_train.dry_run import describe, make_plan
from esr_train.estimate import memory
from esr_train.experiment import load_experiment
from esr_train.launch import start
from esr_train.teacher import DistantTeacher, Sequences
from esr_train.world import World
from tests.kernels.imagined_gpu import imagined_gpu
from tests.test_checkpoint import curve
from tests.test_train import build
from tests.tiny import MakeConfig


def test_a_teacher_on_the_cpu_trains_as_one_beside_the_student(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": 2, "eval__student_text": 4}
    beside = build(make_config(**changes), tmp_path / "beside")
    distant = build(make_config(**changes, teacher__placement="cpu"), tmp_path / "distant")
    assert isinstance(distant.objective.teacher, DistantTeacher)
    beside.run(), distant.run()
    for log in ("metrics.jsonl", "evals.jsonl"):
        assert curve(tmp_path / "beside", log) == curve(tmp_path / "distant", log) != []


def test_ids_go_to_the_teachers_device_and_rows_and_head_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tensors without numbers, on GPUs that are not there: two operands of an operator that are
    on different ones raise."""
    own, beside = "cuda:1", "cuda:0"
    with imagined_gpu(monkeypatch):
        model = _Model(torch.empty(64, 32, device=own), torch.empty(64, 32, device=own))
        rollout: Any = SimpleNamespace(model=model)
        teacher = DistantTeacher(rollout, torch.device(beside))
        ids, rows = (torch.empty(n, dtype=torch.int64, device=beside) for n in ((2, 3), (4,)))
        of_rows = torch.empty(4, device=beside)
        found = teacher.hidden_rows(Sequences(ids, ids, rows, of_rows, rows))
        student, weight = (torch.empty(n, 16, device=beside) for n in (4, 64))
        out = linear_divergence(student, weight, found, teacher.head.weight)
    assert (found.shape, out.loss.device) == ((4, 32), torch.device(beside))
    assert model.weight.device == torch.device(own)


class _Model(nn.Module):
    """An embedding and a head."""

    config = LlamaConfig()

    def __init__(self, embedding: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.embedding, self.weight = embedding, weight

    def get_decoder(self) -> Any:
        return self.decode

    def decode(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        states = functional.embedding(input_ids, self.embedding) * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=states)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.weight, bias=None)


LORA = {"r": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "sharded"}, "teacher.placement: got 'sharded', must be null, fsdp, cpu"),
        (
            {"placement": "cpu", "url": "http://localhost:1"},
            "teacher.placement: got 'cpu', must be left out where teacher.url is set",
        ),
        ({"placement": "cuda:7"}, "teacher.placement: got 'cuda:7', must be cpu"),
        ({"placement": "fsdp"}, "teacher.placement: got 'fsdp', .* and this is one; start them by"),
    ],
)
def test_a_placement_that_one_process_cannot_have_is_refused(
    changes: dict[str, str], message: str, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment(make_config(**{f"teacher__{key}": x for key, x in changes.items()}))


def test_a_device_for_all_processes_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="teacher.placement: got 'fsdp', .* and this is one"):
        start(make_config(teacher__placement="fsdp"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="got 'cuda:1', must be fsdp, cpu or null on several"):
        start(make_config(teacher__placement="cuda:1"))


def test_parts_of_weights_that_are_there_anyway_are_refused(make_config: MakeConfig) -> None:
    two, config = World(), make_config()
    two.size = 2
    config = make_config(
        student__lora=LORA, teacher__model=config.student.model, teacher__placement="fsdp"
    )
    with pytest.raises(ConfigError, match="teacher.placement: got 'fsdp', must be null where stu"):
        load_experiment(config, two)
    with pytest.raises(ConfigError, match="teacher.placement: got 'fsdp', must be null where stu"):
        describe(config)


def test_parts_are_not_compiled(make_config: MakeConfig) -> None:
    for how in ({"runtime__fsdp": True}, {"teacher__placement": "fsdp"}):
        with pytest.raises(ConfigError, match="runtime.compile: got True, must be false where"):
            make_config(**how, runtime__compile=True)


def test_a_dry_run_counts_the_head_alone_of_a_teacher_elsewhere(make_config: MakeConfig) -> None:
    config = make_config()
    plan = make_plan(config, "h100")
    student = sum(p.nbytes for p in plan.student.parameters())
    there = make_config(teacher__placement="cuda:1")
    assert memory(there, plan).weights == student + plan.heads()[1].nbytes
    assert memory(there, plan).weights < memory(config, plan).weights
    assert "on cuda:1, in these times as fast as here" in describe(there, "h100")
    parts = make_config(teacher__placement="fsdp")
    assert "these numbers are of one with all of it" in describe(parts, "h100")
    assert memory(parts, plan).weights == memory(config, plan).weights
