"""transformers' Trainer with a teacher: off-policy, on texts that somebody else wrote."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from esr_kernels.integrations.transformers import Distillation
from esr_train.tasks import builtin_model_path
from esr_train.tasks.sums import SumsTask

names = builtin_model_path("sums-student"), builtin_model_path("sums-teacher")  # or hub ids
student, teacher = map(AutoModelForCausalLM.from_pretrained, names)
tokenizer = AutoTokenizer.from_pretrained(names[0], padding_side="left")
prompts = [problem.prompt for problem in SumsTask().problems("train", 64, seed=0)]
batch = tokenizer(prompts, return_tensors="pt")  # sums are of one length
torch.manual_seed(0)
texts = teacher.generate(**batch, max_new_tokens=16, do_sample=True)  # the teacher's own answers
labels = texts.clone()
labels[:, : batch["input_ids"].shape[1]] = -100  # prompts are not trained on
data = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": own}
    for ids, own in zip(texts, labels, strict=True)
]


class DistillationTrainer(Distillation, Trainer): ...  # the mixin brings the loss


steps = {"max_steps": 4, "per_device_train_batch_size": 16, "logging_steps": 1, "report_to": []}
args = TrainingArguments(tempfile.mkdtemp(), learning_rate=1e-4, **steps)
loss = {"teacher_model": teacher, "divergence": "forward_kl"}
trainer = DistillationTrainer(student, args, train_dataset=data, **loss)
trainer.train()
print("forward KL:", [row["loss"] for row in trainer.state.log_history if "loss" in row])
