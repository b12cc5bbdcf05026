"""The tokenizer of the reasoning-gym pair, and the models that were built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("reasoning_gym")

from esr_train.tasks.gym import GymTask
from tools.build_sudoku import IGNORED, LONGEST, TASK, build_tokenizer, load, solved

MODELS = Path(__file__).parents[2] / "configs" / "sudoku"


def test_tokenizer_gives_back_questions_and_answers_and_has_one_id_for_what_they_share() -> None:
    tokenizer = build_tokenizer()
    for problem in GymTask(TASK).problems("train", 20, seed=0):
        question = tokenizer(str(problem.prompt)).input_ids
        answer = tokenizer(str(problem.answer), add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in question + answer
        assert tokenizer.decode(question, skip_special_tokens=True) == problem.prompt
        assert tokenizer.decode(answer, skip_special_tokens=True) == problem.answer
        assert len(answer) == 31 < LONGEST
        assert len(question) == 34  # <bos>, two pieces, 31 characters


def test_load_has_the_answer_and_its_end_as_labels() -> None:
    tokenizer = build_tokenizer()
    ids, labels = load(tokenizer, 3)
    assert ids.shape == labels.shape == (3, 66)
    assert (labels[:, :34] == IGNORED).all() and torch.equal(labels[:, 34:], ids[:, 34:])
    problems = GymTask(TASK).problems("train", 3, seed=0)
    for row, problem in zip(ids, problems, strict=True):
        assert tokenizer.decode(row[34:]) == f"{problem.answer}<eos>"


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_committed_models_solve_as_much_as_their_card_says(name: str) -> None:
    said = json.loads((MODELS / "card.json").read_text())[name]["solved"]["greedy"]
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype="float32").eval()
    assert solved(model, tokenizer, 0.0) == pytest.approx(said, abs=0.04)
