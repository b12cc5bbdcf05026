"""Answers that end: models with different terminators, with and without merging them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PhiConfig, PhiForCausalLM

from esr_train.config import Config
from esr_train.experiment import load_experiment
from esr_train.metrics import read_rows
from esr_train.terminators import Terminators
from esr_train.train import Trainer
from tests.tiny import char_tokenizer

OWN, OTHERS = 0, 25  # "<eos>" ends the student's answers, "." the teacher's


def _save(directory: Path, end: int, not_an_end: int) -> str:
    """A model whose head has a bias, so that the probability of an end can be set."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=OWN,
    )
    model = PhiForCausalLM(config).eval()
    head = model.lm_head
    with torch.no_grad():
        head.weight[[OWN, OTHERS]] = 0.0
        head.bias[end], head.bias[not_an_end] = 2.5, -6.0
        if end == OTHERS:  # A teacher that has something to teach besides.
            head.weight[2:OTHERS] += 0.1 * torch.randn(OTHERS - 2, 32)
    model.save_pretrained(directory)
    tokenizer = char_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("ends")
    return Config.model_validate(
        {
            "student": {"model": _save(root / "student", OWN, OTHERS)},
            "teacher": {"model": _save(root / "teacher", OTHERS, OWN)},
            "data": {"chat": False},
            "rollout": {"prompts": 8, "samples": 2, "max_new_tokens": 8},
            "optim": {"lr": 0.02},
            "steps": 50,
        }
    )


def _rate_of_own_end(trainer: Trainer) -> float:
    """The share of sampled answers that end by the student's own terminator."""
    batch = trainer.rollout.generate(trainer.prompts.prompts_for(1), 16, 8, 1.0, ("test",))
    last = batch.tokens.gather(1, batch.lengths[:, None] - 1)[:, 0]
    return float((last == OWN).double().mean())


@pytest.mark.parametrize("merges", [False, True], ids=["apart", "merged"])
def test_a_student_keeps_its_own_end_only_where_ends_are_merged(
    config: Config, tmp_path: Path, merges: bool
) -> None:
    loss = config.loss.model_copy(update={"merge_terminators": merges})
    config = config.model_copy(update={"loss": loss})
    trainer = Trainer(config, load_experiment(config), tmp_path, 0, save=False)
    before = _rate_of_own_end(trainer)
    trainer.run()
    after = _rate_of_own_end(trainer)
    divergences = [row["divergence"] for row in read_rows(tmp_path / "metrics.jsonl")]
    print(f"own end: {before:.2f} before, {after:.2f} after; {divergences[0]}, {divergences[-1]}")
    assert before > 0.9
    assert after > 0.9 if merges else after < 0.1
    assert divergences[-1] < 0.5 * divergences[0]


def test_what_is_printed_at_the_start(config: Config) -> None:
    apart = load_experiment(config)
    assert apart.classes(config.loss).merge is None
    # Sampling stops at either end, merged or not.
    assert apart.student.stop_ids == apart.teacher.rollout.stop_ids == [OWN, OTHERS]
    assert apart.notes.startswith("answers end by: '<eos>' (student); '.' (teacher)\nwarning: ")
    loss = config.loss.model_copy(update={"merge_terminators": True})
    merged = load_experiment(config.model_copy(update={"loss": loss}))
    # An arm of a comparison may merge where its experiment does not.
    assert apart.classes(loss).merge == ((OWN, OTHERS), (OWN, OTHERS))
    assert merged.notes.endswith("(teacher); one class in the loss")
    same = Terminators((OWN,), (OWN,)).describe(char_tokenizer(), char_tokenizer(), False)
    assert same == "answers end by: '<eos>' (student); '<eos>' (teacher)"


def test_groups_of_vocabularies_that_are_padded_or_mapped() -> None:
    ends = Terminators(student=(3, 40), teacher=(5, 33))
    # Ids from 32 on mean what they do to one model only.
    assert ends.groups((42, 36), 32) == ((3, 5, 40), (3, 5, 33))
    maps = torch.tensor([0, 3, 7]), torch.tensor([1, 2, 5])
    assert ends.groups((42, 36), maps) == ((3, 7, 40), (2, 5, 33))
