"""A teacher's log-probs at given tokens, against the model itself; and what can be wrong."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from esr_train.config import RuntimeConfig
from esr_train.remote.client import Server, ServerError
from esr_train.remote.rollouts import RemoteRollout
from esr_train.remote.teacher import RemoteTeacher
from esr_train.rollout import RolloutBatch
from esr_train.teacher import Sequences, sequences
from tests.remote.stub import Stub

# The second response is trained on in part, of the third nothing is.
TOKENS = torch.tensor([[3, 4, 0], [6, 7, 8], [9, 10, 0]])
WEIGHTS = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0]])


def read() -> Sequences:
    lengths = torch.tensor([2, 3, 2])
    batch = RolloutBatch([[11, 12], [13], [14]], TOKENS, lengths, torch.zeros(3, dtype=torch.bool))
    return sequences(batch, WEIGHTS, torch.device("cpu"))


def teacher(stub: Stub, count: int, classes: int = 32, size: int = 32) -> RemoteTeacher:
    server = Server("teacher.url", stub.url, "tiny", RuntimeConfig())
    return RemoteTeacher(RemoteRollout(server, classes, [0], spare=1), count, size)


def expected(stub: Stub) -> torch.Tensor:
    """Log-probs [3, 32] of the trained tokens, by the model itself."""
    first, second = stub.logprobs([11, 12, 3, 4]), stub.logprobs([13, 6, 7, 8])
    return torch.stack([first[1], first[2], second[1]])


TRAINED = [3, 4, 7]


def test_all_log_probs_are_those_of_the_model(stub: Stub) -> None:
    found = teacher(stub, 32).top(read())
    assert found.ids.shape == (3, 33) and found.logprobs.dtype == torch.float32
    for row, known in enumerate(expected(stub)):
        assert sorted(found.ids[row].tolist()) == [-1, *range(32)]
        at = found.ids[row, :32]
        torch.testing.assert_close(found.logprobs[row, :32], known[at])


def test_the_largest_are_asked_for_and_the_token_that_is_there(stub: Stub) -> None:
    found = teacher(stub, 3).top(read())
    beyond = 0
    for row, known in enumerate(expected(stub)):
        ids = [token for token in found.ids[row].tolist() if token != -1]
        top = known.topk(3).indices.tolist()
        beyond += TRAINED[row] not in top
        assert set(ids) == {*top, TRAINED[row]}
        torch.testing.assert_close(found.logprobs[row, : len(ids)], known[ids])
        assert bool((found.logprobs[row, len(ids) :] == -torch.inf).all())
    assert beyond > 0


def test_only_what_is_read_is_sent(vllm: Stub) -> None:
    teacher(vllm, 3).top(read())
    sent = [body for path, body in vllm.asked if path == "/v1/completions"]
    prompts = sorted(body["prompt"] for body in sent)
    assert prompts == [[11, 12, 3, 4], [13, 6, 7]]
    assert {(body["prompt_logprobs"], body["max_tokens"]) for body in sent} == {(3, 1)}


def test_no_rows_are_no_requests(vllm: Stub) -> None:
    batch = RolloutBatch([[11]], TOKENS[:1], torch.tensor([2]), torch.tensor([False]))
    nothing = sequences(batch, torch.zeros(1, 3), torch.device("cpu"))
    asked, remote = len(vllm.asked), teacher(vllm, 3)
    assert remote.top(nothing).ids.shape == (0, 4) and len(vllm.asked) == asked + 1


def test_classes_that_the_student_has_not_are_left_to_the_others(stub: Stub) -> None:
    found = teacher(stub, 20, classes=20).top(read())
    assert int(found.ids.max()) < 20
    for row, known in enumerate(expected(stub)):
        ids = found.ids[row][found.ids[row] >= 0]
        torch.testing.assert_close(found.logprobs[row, : len(ids)], known[ids])


def _vllm_entries(change: Any) -> Any:
    def of_answer(answer: Any) -> Any:
        for choice in answer.get("choices", ()):
            change(choice)
        return answer

    return of_answer


def _at(choice: Any, place: int, **logprobs: Any) -> None:
    choice["prompt_logprobs"][place] = {k[1:]: {"logprob": v} for k, v in logprobs.items()}


NO_FIELD = "has no choices[0].prompt_logprobs: no log-probs of given tokens"
BAD = {
    "no field": (lambda c: c.pop("prompt_logprobs"), NO_FIELD),
    "null": (lambda c: c.update(prompt_logprobs=None), NO_FIELD),
    "no values": (
        lambda c: c["prompt_logprobs"].__setitem__(2, {"3": {"rank": 1}}),
        "has no logprob: no log-probs of given tokens",
    ),
    "another form": (
        lambda c: c["prompt_logprobs"].__setitem__(2, "x"),
        "has log-probs of given tokens in an unknown form: {'choices': ",
    ),
    "short": (
        lambda c: c["prompt_logprobs"].__delitem__(slice(2, None)),
        "has log-probs at 2 places, asked for 3",
    ),
    "of others": (lambda c: _at(c, 2, _20=-1.0, _21=-1.0), "is of other tokens: "),
    "of another model": (
        lambda c: _at(c, 2, _3=-1.0, _6=-2.0, _32=-3.0),
        "names token 32, and teacher.model has 32 tokens: the server has another model",
    ),
    "positive": (lambda c: _at(c, 2, _3=0.5, _6=-1.0), "has no log-probs: 0.5"),
    "NaN": (lambda c: _at(c, 2, _3=float("nan"), _6=-1.0), "has no log-probs: nan"),
    "null values": (lambda c: _at(c, 2, _3=None, _6=-1.0), "has no logprob: no log-probs"),
    "scores": (lambda c: _at(c, 2, _3=-0.1, _6=-0.2), "has no log-probs: 2 with a mass of 1.7"),
    "too few": (lambda c: _at(c, 2, _3=-1.0, _6=-1.0), "has 2 log-probs at a place, asked for"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_an_error(vllm: Stub, name: str) -> None:
    change, message = BAD[name]
    remote = teacher(vllm, 3 if name == "too few" else 2)
    remote.top(read())
    vllm.change = _vllm_entries(change)
    batch = RolloutBatch(
        [[11, 12], [13, 14]], TOKENS[:2], torch.tensor([1, 1]), torch.zeros(2, dtype=torch.bool)
    )
    both = sequences(batch, torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]), torch.device("cpu"))
    where = re.escape(f"teacher.url: the answer of {vllm.url}/v1/completions ")
    with pytest.raises(ServerError, match=where + re.escape(message)):
        remote.top(both)


def test_a_server_with_a_limit_is_named(stub: Stub) -> None:
    stub.max_logprobs = 2
    with pytest.raises(ServerError, match="asked for teacher.logprobs=6; vLLM's limit is --max"):
        teacher(stub, 6).top(read())


def test_a_probe_finds_what_a_batch_would(stub: Stub) -> None:
    teacher(stub, 6).probe()
    with pytest.raises(ServerError, match="and teacher.model has 4 tokens: the server has another"):
        teacher(stub, 6, classes=4, size=4).probe()
    stub.max_logprobs = 2
    with pytest.raises(ServerError, match="asked for teacher.logprobs=6"):
        teacher(stub, 6).probe()


def test_sglang_without_log_probs_is_an_error() -> None:
    from tests.remote.stub import serving
    from tests.tiny import tiny_llama

    with serving(tiny_llama(1), "sglang") as stub:
        stub.change = lambda answer: {"meta_info": {}} if "meta_info" in answer else answer
        with pytest.raises(ServerError, match="/generate has no meta_info.input_token_logprobs:"):
            teacher(stub, 3).top(read())
