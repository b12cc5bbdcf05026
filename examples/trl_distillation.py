"""TRL's distillation trainer with this loss, and its rollouts by PrefixRollout."""

import tempfile

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_kernels.integrations.trl import DistillationTrainer, patched
from esr_train.rollout import PrefixRollout
from esr_train.tasks import builtin_model_path
from esr_train.tasks.sums import SumsTask

names = builtin_model_path("sums-student"), builtin_model_path("sums-teacher")  # or hub ids
tokenizer = AutoTokenizer.from_pretrained(names[0], padding_side="left")
prompts = [problem.prompt for problem in SumsTask().problems("train", 64, seed=0)]
args = trl.DistillationConfig(
    tempfile.mkdtemp(),
    max_steps=4,
    per_device_train_batch_size=16,
    learning_rate=1e-4,
    max_completion_length=16,  # N: early stopping is a short completion
    bf16=False,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)
data = {"train_dataset": Dataset.from_dict({"prompt": prompts}), "processing_class": tokenizer}


def losses(make, **others):
    trainer = make(*map(AutoModelForCausalLM.from_pretrained, names), args, **data, **others)
    trainer.train()
    return [round(row["loss"], 3) for row in trainer.state.log_history if "loss" in row]


with patched():  # TRL's own class; its loss is computed by linear_divergence
    print("reverse KL, TRL patched:", losses(trl.DistillationTrainer))
print("reverse KL, subclass:", losses(DistillationTrainer, rollout=PrefixRollout))
