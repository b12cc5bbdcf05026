from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from esr_train.models import head
from esr_train.rollout import ContextError, PrefixRollout, RolloutBatch
from esr_train.rollout.cache import PrefixCache
from tests.tiny import char_tokenizer, tiny_llama

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [3, 3]]
TOKENIZER = char_tokenizer()


def greedy(model: torch.nn.Module, length: int, prompts: list[list[int]] = PROMPTS) -> RolloutBatch:
    return PrefixRollout(model, TOKENIZER).generate(prompts, 1, length, 0.0, (0,))


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


def _constant_model(token: int) -> torch.nn.Module:
    """A model that prefers `token` everywhere, by a bias on its head."""
    model = tiny_llama(tie_word_embeddings=False)
    layer = model.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.zeros(32))
    with torch.no_grad():
        layer.bias[token] = 1000.0
    return model


@pytest.mark.parametrize(
    ("token", "most", "length", "ends"),
    [(0, 5, 1, True), (7, 5, 5, False), (0, 1, 1, True)],
    ids=["eos first", "cut", "eos at the cut"],
)
def test_a_response_ends_by_eos_or_is_cut(token: int, most: int, length: int, ends: bool) -> None:
    batch = greedy(_constant_model(token), most)
    assert batch.lengths.tolist() == [length] * 4
    assert batch.finished_by_eos.tolist() == [ends] * 4
    assert batch.tokens[:, :length].eq(token).all()


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
    with pytest.raises(ContextError, match="at least one token each, row 1 has none"):
        engine.generate([[3], []], 1, 1, 1.0, (0,))
    with pytest.raises(ContextError, match="at least one is needed, got none"):
        engine.generate([], 1, 1, 1.0, (0,))


def _retold(model: torch.nn.Module, batch: RolloutBatch, temperature: float) -> torch.Tensor:
    """Log-probs of all tokens at each position [B, N, V], from a pass over whole sequences."""
    width = batch.tokens.shape[1]
    out = torch.zeros(*batch.tokens.shape, 32)
    for row, prompt in enumerate(batch.prompts):
        ids = torch.tensor([prompt + batch.tokens[row].tolist()])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -width - 1 : -1]
        out[row] = (logits / temperature).log_softmax(-1)
    return out


def test_log_probs_are_those_of_a_pass_over_the_whole() -> None:
    model = tiny_llama()
    batch = PrefixRollout(model, TOKENIZER).generate(PROMPTS, 8, 10, 0.7, (0,))
    told = _retold(model, batch, 0.7).gather(2, batch.tokens[..., None])[..., 0]
    inside = torch.arange(10) < batch.lengths[:, None]
    assert not inside.all()  # some ended before
    torch.testing.assert_close(batch.logprob, told.where(inside, 0.0), rtol=0, atol=2e-5)
    assert not batch.log_kept.any() and not batch.tokens[~inside].any()


def test_filters_cut_what_is_drawn_and_say_how_much() -> None:
    model = tiny_llama()
    batch = PrefixRollout(model, TOKENIZER).generate(PROMPTS, 8, 6, 1.5, (0,), top_k=3)
    told = _retold(model, batch, 1.5)
    inside = torch.arange(6) < batch.lengths[:, None]
    rank = (told > told.gather(2, batch.tokens[..., None])).sum(-1)
    assert rank[inside].unique().tolist() == [0, 1, 2]
    kept = told.topk(3).values.logsumexp(-1).where(inside, 0.0)
    torch.testing.assert_close(batch.log_kept, kept, rtol=0, atol=2e-5)
    for filters in ({"top_p": 1e-4}, {"min_p": 1.0}):
        alone = PrefixRollout(model, TOKENIZER).generate(PROMPTS, 1, 6, 1.0, (0,), **filters)
        assert torch.equal(alone.tokens, greedy(model, 6).tokens)


def _assert_each_row_replays_alone(
    engine: PrefixRollout, batch: RolloutBatch, rows: range, **options: torch.Tensor
) -> None:
    for row in rows:
        alone = engine.generate(
            [batch.prompts[row]],
            1,
            batch.tokens.shape[1],
            options["temperature"][row : row + 1] if options else 1.0,
            (0,),
            row_keys=batch.row_keys[row : row + 1],
        )
        assert alone.response(0) == batch.response(row)
        torch.testing.assert_close(alone.logprob[0], batch.logprob[row], rtol=0, atol=2e-5)


def test_a_row_alone_samples_what_it_did_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end at all times, prompts lose all of their rows, groups are ragged: none of it shows.

    A rounding error of 1e-6 moves one of 1,700 tokens with a probability of about 1e-3; the seed is
    one where it does not.
    """
    sizes: list[tuple[int, int]] = []  # rows and prompts that are left, at every compaction
    place = PrefixCache.place

    def watched(cache: PrefixCache, place_of_row: list[int], prompts: int) -> None:
        place(cache, place_of_row, prompts)
        sizes.append((cache.rows, len({place // 3 for place in place_of_row})))

    monkeypatch.setattr(PrefixCache, "place", watched)
    engine = PrefixRollout(tiny_llama(5), TOKENIZER)
    prompts = [[token, 3] for token in range(2, 26)]
    batch = engine.generate(prompts, 3, 40, 1.0, (0,))
    ragged = [rows for rows, prompts_left in sizes if prompts_left < rows < 3 * prompts_left]
    assert len(ragged) > 5 and sizes[-1][1] < len(prompts)
    _assert_each_row_replays_alone(engine, batch, range(0, 72, 5))


def test_each_row_may_have_a_temperature() -> None:
    engine = PrefixRollout(tiny_llama(5), TOKENIZER)
    prompts = [[token, 3] for token in range(2, 26)]
    temperature = torch.linspace(0, 2, 24)
    batch = engine.generate(prompts, 1, 20, temperature, (0,))
    assert batch.finished_by_eos.any()
    _assert_each_row_replays_alone(engine, batch, range(0, 24, 4), temperature=temperature)
    assert batch.response(0) == greedy(engine.model, 20, prompts[:1]).response(0)


def test_short_rollouts_are_beginnings_of_long_ones() -> None:
    engine = PrefixRollout(tiny_llama(), TOKENIZER)
    short, long = (engine.generate(PROMPTS, 4, length, 1.0, (0,)) for length in (5, 20))
    assert torch.equal(short.tokens, long.tokens[:, :5])
    # Ended rows are dropped when that saves time, which depends on N, and products with another
    # number of rows may round differently.
    torch.testing.assert_close(short.logprob, long.logprob[:, :5], rtol=0, atol=1e-5)


def test_samples_of_a_prompt_are_drawn_apart() -> None:
    """From the first token, which all of them draw from the same hidden state."""
    batch = PrefixRollout(tiny_llama(), TOKENIZER).generate([[3, 4]], 32, 8, 1.0, (0,))
    assert len(batch.tokens[:, 0].unique()) > 5
    assert len(batch.tokens.unique(dim=0)) > 30


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    batch = PrefixRollout(tiny_llama(5), TOKENIZER).generate(
        PROMPTS, 4, 30, 1.0, (0,), on_progress=lambda *at: seen.append(at)
    )
    for done, alive in seen:
        assert alive == int((~batch.finished_by_eos | (batch.lengths > done)).sum())
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) > 5


def test_rows_of_a_batch_are_selected_by_index_or_mask() -> None:
    batch = PrefixRollout(tiny_llama(), TOKENIZER).generate(PROMPTS, 2, 6, 1.0, (0,))
    part = batch.select(torch.tensor([5, 2]))
    assert part.prompts == [PROMPTS[2], PROMPTS[1]] and part.row_keys.tolist() == [5, 2]
    assert torch.equal(part.logprob, batch.logprob[[5, 2]])
    by_hand = RolloutBatch(batch.prompts, batch.tokens, batch.lengths, batch.finished_by_eos)
    assert by_hand.select(torch.tensor([0])).logprob is None
    by_mask = batch.select(torch.tensor([False, True] * 3 + [True, False]))
    assert by_mask.row_keys.tolist() == [1, 3, 5, 6] and by_mask.prompts == PROMPTS
    assert torch.equal(by_mask.tokens, batch.tokens[[1, 3, 5, 6]])
    with pytest.raises(TypeError, match="rows must be a torch.Tensor, got list"):
        batch.select([0, 1])
    for rows in (torch.tensor([99]), torch.tensor([True]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="rows must be"):
            batch.select(rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_keys": torch.arange(3)}, r"row_keys must be int64 of shape \[8\].*\[3\]"),
        ({"row_keys": torch.zeros(8, dtype=torch.int64)}, "row_keys must be distinct"),
        ({"temperature": torch.ones(3)}, r"temperature must be a number or have shape \[8\]"),
        ({"prompts_token_ids": [[3], [4], [5], [99]]}, "token ids must be from 0 to 31, got 99"),
        ({"prompts_token_ids": [1, 2]}, "prompts_token_ids must be a list with a list of ints"),
        ({"prompts_token_ids": [[1.9]]}, "prompts_token_ids must be a list with a list of ints"),
        ({"prompts_token_ids": torch.ones(2, 2)}, "prompts_token_ids must be a list"),
        ({"seed_key": 0}, "seed_key must be a tuple of ints and strings, got 0"),
        ({"max_new_tokens": 8.0}, "max_new_tokens must be an integer of at least 1, got 8.0"),
        ({"samples_per_prompt": True}, "samples_per_prompt must be an integer of at least 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments_are_refused(change: dict, message: str) -> None:
    arguments = {"prompts_token_ids": PROMPTS, "samples_per_prompt": 2, "max_new_tokens": 4}
    arguments |= {"temperature": 1.0, "seed_key": (0,)}
    with pytest.raises((ValueError, TypeError), match=message):
        PrefixRollout(tiny_llama(), TOKENIZER).generate(**arguments | change)


def test_an_engine_for_no_model_or_no_classes_is_refused() -> None:
    model = tiny_llama()
    for wrong in (None, model.model):
        with pytest.raises(TypeError, match="model must be a transformers causal language model"):
            PrefixRollout(wrong, TOKENIZER)
    for classes in (0, -1, 1.5, True, 33):
        with pytest.raises(ValueError, match="classes must be"):
            PrefixRollout(model, TOKENIZER, classes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_captured_step_is_the_step() -> None:
    """On CUDA steps are replayed from a graph; without it the tokens are the same."""
    model = tiny_llama(5).cuda()
    prompts = [[token, 3] for token in range(2, 26)]
    engine = PrefixRollout(model, TOKENIZER)
    replayed = engine.generate(prompts, 4, 100, 1.0, (0,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esr_train.rollout.decoder.SharedPrefixDecoder.captures", False)
        eager = engine.generate(prompts, 4, 100, 1.0, (0,))
    assert torch.equal(replayed.tokens, eager.tokens)
    assert torch.equal(replayed.logprob, eager.logprob)


def test_threads_take_turns_on_a_model() -> None:
    model = tiny_llama()
    expected = PrefixRollout(model, TOKENIZER).generate(PROMPTS, 2, 8, 1.0, (0,)).tokens
    with ThreadPoolExecutor(3) as pool:
        engines = [PrefixRollout(model, TOKENIZER) for _ in range(12)]
        runs = [pool.submit(engine.generate, PROMPTS, 2, 8, 1.0, (0,)) for engine in engines]
        assert all(torch.equal(run.result().tokens, expected) for run in runs)
    assert model.config._attn_implementation == "sdpa"


def _in_autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "contexts",
    [
        (_in_autocast, nullcontext),
        (nullcontext, _in_autocast),
        (nullcontext, lambda: _by_default(torch.bfloat16)),
        (nullcontext, lambda: _by_default(torch.float64)),
    ],
    ids=["autocast first", "autocast second", "bf16 by default", "fp64 by default"],
)
def test_autocast_and_the_default_dtype_change_nothing(contexts: Any) -> None:
    """Neither a rollout nor the verdict on how the model is decoded, which the first call makes."""
    engine = PrefixRollout(tiny_llama(), TOKENIZER)
    batches = []
    for context in contexts:
        with context():
            batches.append(engine.generate(PROMPTS, 2, 8, 1.0, (0,)))
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    assert torch.equal(batches[0].logprob, batches[1].logprob)
