from __future__ import annotations

import pytest
import torch

from esr_train.models import head
from esr_train.rollout import ContextError, PrefixRollout, RolloutBatch
from tests.tiny import char_tokenizer, tiny_llama

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [3, 3]]
TOKENIZER = char_tokenizer()


def greedy(model: torch.nn.Module, length: int, prompts: list[list[int]] = PROMPTS) -> RolloutBatch:
    return PrefixRollout(model, TOKENIZER).generate(prompts, 1, length, 0.0, (0,))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_what_transformers_generates(seed: int) -> None:
    """Mixed prompt lengths; eos == pad == 0, and rows that end at different times."""
    model = tiny_llama(seed)
    ours = greedy(model, 24)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert ours.response(row) == theirs
        assert bool(ours.finished_by_eos[row]) == (theirs[-1] == 0)


def test_the_same_key_replays_and_another_does_not() -> None:
    engine = PrefixRollout(tiny_llama(), TOKENIZER)
    first, again, other = (
        engine.generate(PROMPTS, 3, 12, 1.0, key) for key in [(0, 1), (0, 1), (0, 2)]
    )
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.lengths, again.lengths)
    assert not torch.equal(first.tokens, other.tokens)


def test_samples_follow_the_softmax_of_the_model() -> None:
    model, count = tiny_llama(), 20_000
    for temperature in (1.0, 0.5):
        batch = PrefixRollout(model, TOKENIZER).generate([[3, 4]], count, 1, temperature, (0,))
        seen = torch.bincount(batch.tokens[:, 0], minlength=32)
        with torch.no_grad():
            expected = (model(torch.tensor([[3, 4]])).logits[0, -1] / temperature).softmax(-1)
        expected = expected.double() * count
        # Chi-squared with 31 degrees of freedom exceeds 80 with probability 3e-6.
        assert float(((seen - expected) ** 2 / expected).sum()) < 80


def test_rows_that_are_dropped_do_not_change_the_others() -> None:
    """A row samples the same greedy tokens alone and among rows that end before it."""
    model = tiny_llama(5)
    prompts = [[token] for token in range(2, 26)]
    together = greedy(model, 40, prompts)
    ended = together.lengths[together.finished_by_eos]
    assert 0 < len(ended) and 2 * int((together.lengths < 40).sum()) > len(prompts)
    for row, prompt in enumerate(prompts):
        assert greedy(model, 40, [prompt]).response(0) == together.response(row)


def _constant_model(token: int) -> torch.nn.Module:
    """A model that prefers `token` everywhere, by a bias on its head."""
    model = tiny_llama(tie_word_embeddings=False)
    layer = model.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.zeros(32))
    with torch.no_grad():
        layer.bias[token] = 1000.0
    return model


def test_eos_as_the_first_token() -> None:
    batch = greedy(_constant_model(0), 5)
    assert batch.lengths.tolist() == [1] * 4
    assert batch.finished_by_eos.all() and (batch.tokens == 0).all()


def test_no_eos_is_a_cut_and_eos_at_the_cut_is_an_end() -> None:
    cut = greedy(_constant_model(7), 5)
    assert cut.lengths.tolist() == [5] * 4 and not cut.finished_by_eos.any()
    at_the_cut = greedy(_constant_model(0), 1)
    assert at_the_cut.lengths.tolist() == [1] * 4 and at_the_cut.finished_by_eos.all()


def test_every_eos_id_ends_a_response() -> None:
    model = _constant_model(7)
    model.generation_config.eos_token_id = [5, 7]
    engine = PrefixRollout(model, TOKENIZER)
    assert engine.eos_ids == [0, 5, 7]
    assert engine.generate(PROMPTS, 1, 5, 0.0, (0,)).finished_by_eos.all()


def test_a_pad_token_inside_a_prompt_is_a_token() -> None:
    """Padding is known by position: a prompt may hold the pad id and give another answer for it."""
    model = tiny_llama()
    with_pad, without = greedy(model, 6, [[0, 0, 3], [3]]), greedy(model, 6, [[3]])
    alone = greedy(model, 6, [[0, 0, 3]])
    assert with_pad.response(0) == alone.response(0) != without.response(0)
    assert with_pad.response(1) == without.response(0)


def test_defaults_of_the_generation_config_are_not_applied() -> None:
    model, changed = tiny_llama(), tiny_llama()
    changed.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    a, b = (
        PrefixRollout(m, TOKENIZER).generate(PROMPTS, 2, 8, 1.0, (0,)) for m in (model, changed)
    )
    assert torch.equal(a.tokens, b.tokens)


def test_tokens_beyond_the_shared_classes_are_never_sampled() -> None:
    engine = PrefixRollout(_constant_model(30), TOKENIZER, classes=26)
    assert int(engine.generate(PROMPTS, 4, 8, 1.0, (0,)).tokens.max()) < 26
    assert head(engine.model).first(26).weight.shape[0] == 26


def test_context_overflow_is_refused_before_work() -> None:
    engine = PrefixRollout(tiny_llama(), TOKENIZER)
    engine.check_fits([[3] * 28], 100)
    with pytest.raises(ContextError, match=r"longest prompt has 29 tokens.*100 new.*128"):
        engine.generate([[3], [3] * 29], 1, 100, 1.0, (0,))
    with pytest.raises(ContextError, match="none may be empty"):
        engine.generate([[3], []], 1, 1, 1.0, (0,))
