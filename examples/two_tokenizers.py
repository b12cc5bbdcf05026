"""Student and teacher with other tokenizers: compared where a token of both begins."""

import tempfile
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esr_train.config import Config
from esr_train.experiment import load_experiment
from esr_train.tasks.sums import SumsTask, step_by_step, summands_of
from esr_train.train import Trainer

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as directory:
    # In place of a teacher from the hub: an untrained one, whose tokens are pairs of characters
    # and longer, where the student's are single characters.
    texts = [step_by_step(summands_of(p)) for p in SumsTask().problems("train", 50, seed=0)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=400, special_tokens=["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, eos_token_id=0, **sizes)
    teacher = Path(directory) / "teacher"
    tokenizer.save_pretrained(teacher)
    LlamaForCausalLM(shape).save_pretrained(teacher)

    settings = {"student": {"model": "builtin:sums-student"}, "teacher": {"model": str(teacher)}}
    settings |= {"rollout": {"max_new_tokens": 32}, "optim": {"lr": 1e-3}, "steps": 8}
    config = Config.model_validate(settings | {"loss": {"merge_terminators": True}})
    experiment = load_experiment(config)
    print(experiment.notes)
    trainer = Trainer(config, experiment, Path(directory), seed=0, save=False)
    shown = "divergence", "aligned_share", "student_shared_mass", "teacher_shared_mass"
    trainer.on_step = lambda row, _: print({key: round(row[key], 3) for key in shown})
    trainer.run()
