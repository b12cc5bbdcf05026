"""Students that leave the steps at a known place: their texts, and the committed models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_train.rollout import PrefixRollout
from esr_train.tasks.sums import ALPHABET, SumsTask, step_by_step, summands_of
from tests.tiny import tiny_llama
from tools.build_fork import NOISE, abandoned, disturb
from tools.build_sums import build_tokenizer

PLACES = {"fork-40": ("first sum", 43, 48), "fork-120": ("last tens", 111, 126)}
MODELS = Path(__file__).parents[2] / "configs" / "fork"


def _parting(text: str, steps: str) -> int | None:
    """The first character in which two answers differ."""
    pairs = enumerate(zip(text, steps, strict=False))
    return next((i for i, pair in pairs if len({*pair}) == 2), None)


@pytest.mark.parametrize("name", PLACES)
def test_answers_leave_the_steps_at_the_fork_and_end_in_a_guess(name: str) -> None:
    after, low, high = PLACES[name]
    rng, wrong = random.Random(0), 0
    for problem in SumsTask().problems("train", 500, seed=0):
        summands = summands_of(problem)
        text, steps = abandoned(summands, rng, after), step_by_step(summands)
        at = _parting(text, steps)
        assert at is not None and low <= at <= high
        assert text[at:].startswith(("well, ", "hmm, "))
        assert len(text) <= 220 and set(text) <= set(ALPHABET)
        wrong += SumsTask().score(problem, text)["accuracy"] == 0
    assert wrong > 450


@pytest.mark.parametrize("name", PLACES)
def test_a_committed_student_parts_from_the_steps_at_its_fork(name: str) -> None:
    _, low, high = PLACES[name]
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype="float32").eval()
    problems = SumsTask().problems("heldout", 16, seed=1)
    prompts = [list(tokenizer(str(problem.prompt)).input_ids) for problem in problems]
    batch = PrefixRollout(model, tokenizer).generate(prompts, 1, high + 8, 0.0, ("test",))
    places = []
    for row, problem in enumerate(problems):
        text = tokenizer.decode(batch.response(row), skip_special_tokens=True)
        places.append(_parting(text, step_by_step(summands_of(problem))))
    left = [place for place in places if place is not None]
    outside = [place for place in left if not low <= place <= high]  # a slip in the arithmetic
    assert len(left) > 8 and len(outside) <= 1, places


def test_noise_is_in_proportion_to_each_matrix_and_leaves_norms_alone() -> None:
    torch.manual_seed(0)
    clean, noisy = tiny_llama(0, hidden_size=64), tiny_llama(0, hidden_size=64)
    disturb(noisy)
    for before, after in zip(clean.parameters(), noisy.parameters(), strict=True):
        if before.ndim == 2:
            noise = (after - before).detach().std() / before.detach().std()
            assert noise.item() == pytest.approx(NOISE, rel=0.2)
        else:
            assert torch.equal(before, after)
