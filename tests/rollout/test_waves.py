"""Which responses are decoded at once: the bookkeeping, and that it changes no sample."""

from __future__ import annotations

import random

import pytest
import torch

from esr_train.rollout import PrefixRollout, RolloutBatch, decoder, engine
from esr_train.rollout.loop import Sampling
from esr_train.rollout.waves import Room, Rows, fixed_sizes, room
from tests.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [[token, 3, 5][: 1 + token % 3] for token in range(2, 26)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, Room(6, 24)),
        (6 * 10 + 24 * 5, Room(6, 24)),  # all of it
        (6 * 10 + 24 * 5 - 1, Room(6, 23)),  # one response less
        (2 * 30, Room(2, 8)),  # two prompts with their four responses
        (2 * 30 + 10 + 2 * 5, Room(3, 10)),  # and one with two
        (2 * 30 + 10 + 4, Room(2, 8)),  # no response fits beside the third
        (15, Room(1, 1)),
    ],
)
def test_as_many_rows_as_a_budget_holds(budget: int | None, expected: Room) -> None:
    assert room(6, 4, width=10, capacity=5, budget=budget) == expected
    if budget is not None:
        assert expected.prompts * 10 + expected.rows * 5 <= budget


def test_a_budget_below_one_response_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens_in_flight must be at least 15, .*got 14"):
        room(6, 4, width=10, capacity=5, budget=14)


def test_responses_of_one_token_take_no_room_of_their_own() -> None:
    assert room(6, 4, width=10, capacity=0, budget=25) == Room(2, 8)


def test_batch_sizes_are_few() -> None:
    assert fixed_sizes(64) == [64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    assert fixed_sizes(50)[:3] == [50, 48, 32] and fixed_sizes(1) == [1]
    assert len(fixed_sizes(3000)) < 25


@pytest.mark.parametrize("seed", range(20))
def test_every_response_is_decoded_once_beside_its_prompt(seed: int) -> None:
    """Random rooms, and random ends: the invariants that the tensors rely on hold at all times."""
    rng = random.Random(seed)
    samples, prompts = rng.randint(1, 5), rng.randint(1, 12)
    responses, capacity = prompts * samples, rng.randint(1, 9)
    budget = rng.randint(7 + capacity, prompts * 7 + responses * capacity)
    space = room(prompts, samples, 7, capacity, budget)
    rows = Rows(responses, samples, space, rng.choice([None, fixed_sizes(space.rows)]))
    tensor_of_row: dict[int, int] = {}  # what copies and entries put into each row
    tensor_of_place: dict[int, int] = {}
    done: list[int] = []
    while len(done) < responses:
        if rows.should_enter():
            entry = rows.enter()
            assert entry.rows
            tensor_of_place.update(entry.prompts)
            tensor_of_row.update(entry.rows)
        elif not rows.waiting and rows.fitting() < len(rows.row):
            moves = rows.shrink(rows.fitting())
            assert len(rows.row) >= len(rows.live)
            for kept, pairs in ((tensor_of_place, moves.prompts), (tensor_of_row, moves.rows)):
                assert not {source for source, _ in pairs} & {target for _, target in pairs}
                for source, target in pairs:
                    kept[target] = kept[source]
        where = rows.place_of_row()
        assert len(set(where)) == len(where) and max(where) < len(rows.place) * samples
        for row in rows.live:
            response = rows.row[row]
            assert tensor_of_row[row] == response
            assert tensor_of_place[where[row] // samples] == response // samples
        ended = rng.sample(rows.live, rng.randint(0, len(rows.live)))
        done += [rows.row[row] for row in ended]
        rows.retire(ended)
    assert sorted(done) == list(range(responses)) and not rows.waiting


def _assert_equal(found: RolloutBatch, expected: RolloutBatch) -> None:
    for name in ("tokens", "lengths", "finished_by_eos", "finished_by", "row_keys"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.logprob, expected.logprob, rtol=0, atol=1e-5)
    assert found.prompts == expected.prompts


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("budget", [43, 150, 400, 2000])
def test_waves_sample_what_all_rows_at_once_do(samples: int, budget: int) -> None:
    """In fp64, where rounding moves a token with a probability of about 1e-14."""
    rollout = PrefixRollout(tiny_llama(5).double(), TOKENIZER)
    expected = rollout.generate(PROMPTS, samples, 40, 1.0, (0,))
    at_once = rollout.kv_bytes
    assert 0.2 < float(expected.finished_by_eos.double().mean()) < 1
    waves = rollout.generate(PROMPTS, samples, 40, 1.0, (0,), max_tokens_in_flight=budget)
    _assert_equal(waves, expected)
    of_a_token = decoder.token_bytes(rollout.model.model)
    assert rollout.kv_bytes <= budget * of_a_token
    assert rollout.kv_bytes < at_once or budget * of_a_token >= at_once


def test_rows_take_the_place_of_those_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far fewer steps than whole waves one after the other would take, at the same memory."""
    steps: list[int] = []
    step = Sampling._step

    def counted(self: Sampling) -> None:
        steps.append(len(self.rows.live))
        step(self)

    monkeypatch.setattr(Sampling, "_step", counted)
    rollout = PrefixRollout(tiny_llama(5), TOKENIZER)
    length, in_flight = 40, 8
    prompts = PROMPTS * 4
    batch = rollout.generate(
        prompts, 1, length, 1.0, (0,), max_tokens_in_flight=in_flight * (3 + length - 1)
    )
    needed = int((batch.lengths - 1).sum())  # the first token comes with the prompt
    assert max(steps) == in_flight and sum(steps) == needed
    longest_of_each_wave = (batch.lengths - 1).view(-1, in_flight).max(1).values
    assert len(steps) < 0.75 * int(longest_of_each_wave.sum())
    # While responses wait, at most a quarter of the rows idle.
    waiting = steps[:-length]
    assert len(waiting) > length and min(waiting) > 0.7 * in_flight


def test_a_row_of_nan_does_not_spoil_those_that_take_its_place() -> None:
    """Attention multiplies what lies beyond a row's length by 0."""
    model = tiny_llama(5).double()
    rollout = PrefixRollout(model, TOKENIZER, classes=31)
    prompts = [[31, 3], *([token, 3] for token in range(2, 14))]
    expected = rollout.generate(prompts[1:], 1, 20, 1.0, (0,), row_keys=torch.arange(1, 13))
    with torch.no_grad():
        model.model.embed_tokens.weight[31] = torch.nan
    head = model.lm_head.weight
    assert head is not model.model.embed_tokens.weight
    batch = rollout.generate(prompts, 1, 20, 1.0, (0,), max_tokens_in_flight=2 * 21)
    assert batch.logprob[0].isnan().any()
    for row in range(12):
        assert batch.response(row + 1) == expected.response(row)


@pytest.mark.parametrize("budget", [50, 100, 170, 10_000])
def test_models_without_shared_prompts_go_one_wave_after_the_other(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(5).double()
    expected = PrefixRollout(model, TOKENIZER).generate(PROMPTS, 3, 40, 1.0, (0,))
    monkeypatch.setattr(decoder, "why_unsupported", lambda _: "it is a test")
    rollout = PrefixRollout(model, TOKENIZER)
    temperature = torch.ones(len(PROMPTS) * 3)
    batch = rollout.generate(PROMPTS, 3, 40, temperature, (0,), max_tokens_in_flight=budget)
    _assert_equal(batch, expected)
    with pytest.raises(ValueError, match="max_tokens_in_flight must be at least 42"):
        rollout.generate(PROMPTS, 3, 40, 1.0, (0,), max_tokens_in_flight=41)


def test_by_default_a_rollout_takes_no_more_than_a_stated_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoder, "_CPU_BYTES", 20_000)
    rollout = PrefixRollout(tiny_llama(5), TOKENIZER)
    rollout.generate(PROMPTS, 1, 40, 1.0, (0,))
    assert 10_000 < rollout.kv_bytes <= 20_000
    monkeypatch.undo()
    rollout.generate(PROMPTS, 1, 40, 1.0, (0,))
    assert rollout.kv_bytes > 20_000


def test_responses_end_at_the_stop_ids_of_the_teacher_too() -> None:
    model = tiny_llama(5)
    own = PrefixRollout(model, TOKENIZER).generate(PROMPTS, 4, 30, 1.0, (0,))
    row = int((own.lengths > 8).nonzero()[0])
    stop = int(own.tokens[row, 5])
    early = own.response(row).index(stop) + 1
    rollout = PrefixRollout(model, TOKENIZER, stop_ids=[stop, 0])
    assert rollout.eos_ids == [0] and rollout.stop_ids == [0, stop]
    both = rollout.generate(PROMPTS, 4, 30, 1.0, (0,))
    assert both.response(row) == own.response(row)[:early] and both.finished_by[row] == stop
    for row in range(len(both.prompts)):
        response = both.response(row)
        assert response == own.response(row)[: len(response)]
        by = int(both.finished_by[row])
        assert bool(both.finished_by_eos[row]) == (by >= 0)
        assert by == response[-1] if by >= 0 else not {0, stop} & set(response)
    assert set(both.finished_by.tolist()) == {-1, 0, stop}
    for wrong in ([-1], [True], ["a"]):
        with pytest.raises(ValueError, match="stop_ids must be token ids"):
            PrefixRollout(model, TOKENIZER, stop_ids=wrong)


def test_a_budget_that_is_no_count_is_refused() -> None:
    rollout = PrefixRollout(tiny_llama(), TOKENIZER)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="max_tokens_in_flight must be an integer"):
            rollout.generate(PROMPTS, 1, 4, 1.0, (0,), max_tokens_in_flight=wrong)


def test_buffers_are_not_kept_where_nothing_is_captured() -> None:
    rollout = PrefixRollout(tiny_llama(), TOKENIZER)
    rollout.generate(PROMPTS, 1, 4, 1.0, (0,))
    assert not rollout._kept and engine._recorder(torch.device("cpu")) is None
