"""When steps run, are captured and are replayed, and how long buffers live.

The capture itself needs CUDA. A recorder that keeps the step and runs it takes its place here, so
decisions and buffers are those of a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch

from esr_train.rollout import PrefixRollout, engine
from esr_train.rollout.graphs import StepGraphs, weights_state
from tests.tiny import char_tokenizer, tiny_llama

TOKENIZER = char_tokenizer()
PROMPTS = [[token, 3, 5][: 1 + token % 3] for token in range(2, 26)]


class _Recorder:
    def __init__(self) -> None:
        self.events: list[str] = []

    def warm_up(self, step: Callable[[], None]) -> None:
        self.events.append("warm-up")
        step()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")

        def replay() -> None:
            self.events.append("replay")
            step()

        return replay


class _NoCapture(_Recorder):
    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_is_captured_at_its_third_call_and_replayed() -> None:
    recorder = _Recorder()
    graphs, calls = StepGraphs(recorder), []
    for number in range(6):
        graphs.run("a", lambda: calls.append(0))
        assert len(calls) == number + 1
    assert recorder.events == ["warm-up"] * 2 + ["capture"] + ["replay"] * 4
    graphs.run("b", lambda: calls.append(0))
    assert recorder.events[-1] == "warm-up" and len(graphs) == 1


def test_without_a_recorder_every_call_runs_the_step() -> None:
    graphs, calls = StepGraphs(None), []
    for _ in range(4):
        graphs.run("a", lambda: calls.append(0))
    assert len(calls) == 4 and len(graphs) == 0


def test_graphs_are_bounded_and_the_oldest_go() -> None:
    recorder = _Recorder()
    graphs = StepGraphs(recorder)
    for key in range(100):
        for _ in range(3):
            graphs.run(key, lambda: None)
            graphs.run("every time", lambda: None)
    assert len(graphs) == 40
    recorder.events.clear()
    graphs.run("every time", lambda: None)
    graphs.run(99, lambda: None)
    graphs.run(0, lambda: None)
    assert recorder.events == ["replay", "replay", "warm-up"]
    graphs.forget(lambda key: key == 99)
    graphs.run(99, lambda: None)
    assert recorder.events[-1] == "warm-up"


def test_a_failed_capture_is_said_once_and_steps_go_on(caplog: pytest.LogCaptureFixture) -> None:
    graphs, calls = StepGraphs(_NoCapture()), []
    for _ in range(5):
        graphs.run("a", lambda: calls.append(0))
        graphs.run("b", lambda: calls.append(1))
    assert calls == [0, 1] * 5
    [note] = [record.getMessage() for record in caplog.records]
    assert "without CUDA graphs" in note and "not permitted when stream is capturing" in note


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Recorder]]:
    """Engines capture their steps; all recorders that they made."""
    made: list[_Recorder] = []

    def make(_: torch.device) -> _Recorder:
        made.append(_Recorder())
        return made[-1]

    monkeypatch.setattr(engine, "_recorder", make)
    return made


def _addresses(rollout: PrefixRollout) -> list[int]:
    [lanes] = rollout._kept.values()
    own = (lanes.seed, lanes.tokens, lanes.logprob, lanes.log_kept, *lanes.per_row)
    stored = [tensor for layer in lanes.decoder.cache.stored for tensor in layer.buffers]
    return [tensor.data_ptr() for tensor in (*own, *stored)]


def test_captures_live_from_rollout_to_rollout(recorders: list[_Recorder]) -> None:
    """Other prompts and seeds, weights changed in place: the same buffers, and nothing captured
    that was captured before. Each batch size is captured once, and there are few."""
    model = tiny_llama(5).double()
    rollout = PrefixRollout(model, TOKENIZER)
    tokens = []
    for number in range(3):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += 0.01 * number
        prompts = [[*prompt, 7][-1 - number :] for prompt in PROMPTS]
        tokens.append(rollout.generate(prompts, 2, 60, 1.0, (number,)))
        plain = PrefixRollout(model, TOKENIZER)
        plain._graphs = StepGraphs(None, weights_state(model))
        expected = plain.generate(prompts, 2, 60, 1.0, (number,))
        assert torch.equal(tokens[-1].tokens, expected.tokens)
        if number == 0:
            first = _addresses(rollout)
            captures = recorders[0].events.count("capture")
            [lanes] = rollout._kept.values()
            sizes = {key[1] for key in rollout._graphs._calls}
            assert sizes <= {48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1} and len(sizes) > 3
    assert _addresses(rollout) == first and len(recorders) == 1
    events = recorders[0].events
    assert captures >= 3 and events.count("capture") <= len(sizes) + 2
    assert events.count("warm-up") <= 2 * (len(sizes) + 2) and events.count("replay") > 100


def test_numbers_that_a_graph_holds_are_part_of_its_key(recorders: list[_Recorder]) -> None:
    rollout = PrefixRollout(tiny_llama(5), TOKENIZER)
    for params in ({"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 1.0, "top_k": 3}):
        rollout.generate(PROMPTS, 1, 8, seed_key=(0,), **params)
    keys = {key[2:] for key in rollout._graphs._graphs}
    assert len(keys) == 3 and len(rollout._kept) == 1
    temperature = torch.full((len(PROMPTS),), 0.5)
    rollout.generate(PROMPTS, 1, 8, temperature, (0,))
    assert len({key[2:] for key in rollout._graphs._graphs}) == 4


def test_a_longer_prompt_fits_the_same_buffers_or_makes_new_ones(
    recorders: list[_Recorder],
) -> None:
    rollout = PrefixRollout(tiny_llama(5), TOKENIZER)
    for longest, shapes in ((3, 1), (60, 1), (70, 1)):
        rollout.generate([[3] * longest, [4]], 1, 8, 1.0, (0,))
        assert len(rollout._kept) == shapes
    [lanes] = rollout._kept.values()
    assert lanes.shape.width == 128
    # Graphs of the narrower buffers went with them.
    assert {key[0] for key in rollout._graphs._graphs} == {id(lanes)}


def test_few_shapes_are_kept_and_none_that_is_large(
    recorders: list[_Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = PrefixRollout(tiny_llama(5), TOKENIZER)
    for count in (2, 3, 4):
        rollout.generate(PROMPTS[:count], 1, 8, 1.0, (0,))
    assert [lanes.shape.rows for lanes in rollout._kept.values()] == [3, 4]
    small = next(reversed(rollout._kept.values())).bytes
    monkeypatch.setattr(engine, "_KEPT_BYTES", small)
    rollout.generate(PROMPTS, 1, 8, 1.0, (0,))
    assert small not in [lanes.bytes for lanes in rollout._kept.values() if lanes.shape.rows > 4]
    assert all(lanes.bytes <= small for lanes in rollout._kept.values())


@pytest.mark.parametrize("change", ["data", "cast", "merge", "disable"])
def test_weights_that_are_replaced_are_captured_again(
    change: str, recorders: list[_Recorder]
) -> None:
    model: Any = tiny_llama(5)
    if change in ("merge", "disable"):
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    rollout = PrefixRollout(model, TOKENIZER)
    rollout.generate(PROMPTS, 1, 8, 1.0, (0,))
    before = weights_state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert weights_state(model) == before
    if change == "data":
        layer = model.get_decoder().layers[1].mlp.up_proj
        layer.weight.data = layer.weight.data.clone()
    elif change == "cast":
        model.double()
    elif change == "merge":
        model.merge_adapter()
    else:
        model.base_model.disable_adapter_layers()
    assert weights_state(model) != before
    rollout.generate(PROMPTS, 1, 8, 1.0, (0,))
    assert [recorder.events.count("capture") for recorder in recorders] == [1, 1]


def test_buffers_go_with_the_engine_and_on_release(recorders: list[_Recorder]) -> None:
    """By reference counts alone: a collection of circles may come late, and memory is short."""
    rollout = PrefixRollout(tiny_llama(5), TOKENIZER)

    def run(rollout: PrefixRollout, length: int) -> weakref.ref[Any]:
        rollout.generate(PROMPTS, 2, length, 1.0, (0,))
        [lanes] = rollout._kept.values()
        return weakref.ref(lanes.decoder.cache)

    first = run(rollout, 12)
    assert first() is not None and len(rollout._graphs) == 1
    rollout.release()
    assert first() is None
    # Two steps, which are not captured: what the recorder of these tests keeps is the step, which
    # refers to the graphs.
    second = run(rollout, 3)
    assert second() is not None and len(recorders) == 2
    del rollout
    assert second() is None
