"""The Trainer mixin against a training loop in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from esr_kernels.integrations.transformers import Distillation
from tests.tiny import tiny_llama


class DistillationTrainer(Distillation, Trainer):
    pass


def _rows(count=8):
    """Texts of several lengths, padded on the right; the first two or more tokens are a prompt."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        length, prompt = 5 + index % 4, 2 + index % 3
        ids = torch.randint(2, 32, (9,), generator=generator)
        kept = torch.arange(9) < length
        labels = torch.where(kept & (torch.arange(9) >= prompt), ids, -100)
        rows.append({"input_ids": ids, "attention_mask": kept.long(), "labels": labels})
    return rows


def _pair():
    # The teacher's vocabulary has a larger padding.
    return tiny_llama(0), tiny_llama(1, hidden_size=48, vocab_size=34)


def _trainer(directory, student, teacher, **settings):
    options = settings.pop("options", {})
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    made = DistillationTrainer(
        student,
        TrainingArguments(str(directory), **{**arguments, **settings}),
        train_dataset=_rows(),
        eval_dataset=_rows(4),
        teacher_model=teacher,
        **options,
    )
    return made


def _loss_in_plain_pytorch(student, teacher, rows):
    """Mean reverse KL over the labelled tokens of rows, by all logits."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch.pop("labels")[:, 1:]
    log_p = F.log_softmax(student(**batch).logits[:, :-1, :32], -1)
    with torch.no_grad():
        log_q = F.log_softmax(teacher(**batch).logits[:, :-1, :32], -1)
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    return per_token[labels != -100].mean()


def _weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_run_is_that_of_plain_pytorch(tmp_path):
    student, teacher = _pair()
    trainer = _trainer(tmp_path, student, teacher)
    trainer.train()
    plain, teacher = _pair()
    expected = []
    for step in range(2):
        loss = _loss_in_plain_pytorch(plain, teacher, _rows()[4 * step : 4 * step + 4])
        loss.backward()
        expected.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert found == pytest.approx(expected, rel=1e-5)
    moved = (_weights(tiny_llama(0)) - _weights(plain)).norm()
    assert (_weights(student) - _weights(plain)).norm() < 1e-4 * moved


def test_four_batches_of_one_accumulate_to_one_of_four(tmp_path):
    students = []
    for size, steps in ((4, 1), (1, 4)):
        student, teacher = _pair()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = _trainer(tmp_path, student, teacher, **settings)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        students.append((_weights(student), losses))
    moved = (_weights(tiny_llama(0)) - students[0][0]).norm()
    assert (students[0][0] - students[1][0]).norm() < 1e-4 * moved
    assert students[0][1] == pytest.approx(students[1][1], rel=1e-5)


def test_without_a_count_the_trainer_divides_by_the_steps(tmp_path):
    trainer = _trainer(tmp_path, *_pair(), gradient_accumulation_steps=2, max_steps=1)
    trainer._get_num_items_in_batch = lambda *_: None
    trainer.train()
    parts = [_loss_in_plain_pytorch(*_pair(), _rows()[start : start + 4]) for start in (0, 4)]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(sum(parts)) / 2, rel=1e-5)


def test_lora_trains_its_adapters_only(tmp_path):
    peft = pytest.importorskip("peft")
    student, teacher = _pair()
    before = _weights(student)
    model = peft.get_peft_model(student, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    trainer = _trainer(tmp_path, model, teacher, options={"divergence": "forward_kl"})
    trainer.train()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapters and all(float(p.detach().norm()) > 0 for p in adapters)
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert torch.equal(torch.cat([p.detach().flatten() for p in base]), before)
    head = peft.get_peft_model(
        tiny_llama(0), peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(ValueError, match="remove the head from target_modules"):
        _trainer(tmp_path, head, _pair()[1]).train()


def test_evaluation_with_and_without_logits(tmp_path):
    student, teacher = _pair()
    expected = float(_loss_in_plain_pytorch(student, teacher, _rows(4)))
    trainer = _trainer(tmp_path, student, teacher)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = trainer.predict(_rows(4))
    assert predicted.predictions.shape == (4, 9, 32)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_labels_mix_in_and_are_required(tmp_path):
    student, teacher = _pair()
    trainer = _trainer(tmp_path, student, teacher, options={"loss_options": {"label_weight": 0.5}})
    batch = {name: torch.stack([row[name] for row in _rows(4)]) for name in _rows()[0]}
    labels = batch["labels"][:, 1:]
    logits = student(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    soft = _loss_in_plain_pytorch(student, teacher, _rows(4))
    torch.testing.assert_close(trainer.compute_loss(student, batch), soft + 0.5 * hard)
    del batch["labels"]
    with pytest.raises(ValueError, match="inputs must have labels"):
        trainer.compute_loss(student, batch)


def test_all_labels_masked_is_a_zero_with_a_graph(tmp_path):
    student, teacher = _pair()
    trainer = _trainer(tmp_path, student, teacher)
    batch = {name: torch.stack([row[name] for row in _rows(2)]) for name in _rows()[0]}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    assert float(loss) == 0.0
    assert not any(p.grad.any() for p in student.parameters())


def test_ddp_reduces_every_gradient(tmp_path):
    """The loss runs inside of the wrapper's forward, so that its hooks see the backward."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student, teacher = _pair()
        trainer = _trainer(tmp_path, student, teacher)
        wrapped = DistributedDataParallel(student)
        reduced = []

        def hook(state, bucket):
            reduced.extend(p.shape for p in bucket.parameters())
            done = torch.futures.Future()
            done.set_result(2 * bucket.buffer())
            return done

        wrapped.register_comm_hook(None, hook)
        batch = {name: torch.stack([row[name] for row in _rows(4)]) for name in _rows()[0]}
        trainer.compute_loss(wrapped, batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(reduced) == len(list(student.parameters()))
    plain, teacher = _pair()
    _loss_in_plain_pytorch(plain, teacher, _rows(4)).backward()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, 2 * theirs.grad, rtol=1e-4, atol=1e-6)
    assert "forward" not in student.__dict__
