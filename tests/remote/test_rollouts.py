"""Answers by token ids from a server, against this process's engine; and what can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esr_train.config import RuntimeConfig
from esr_train.remote.client import Server, ServerError
from esr_train.remote.rollouts import RemoteRollout
from esr_train.rollout import ContextError, PrefixRollout
from tests.remote.stub import Stub

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]


def remote(stub: Stub, **options: Any) -> RemoteRollout:
    server = Server("rollout.url", stub.url, "tiny", RuntimeConfig())
    return RemoteRollout(server, 32, [0, 5], **options)


def test_greedy_answers_are_those_of_the_engine_here(stub: Stub) -> None:
    own = PrefixRollout(stub.model, None, stop_ids=[0, 5])
    for length in (1, 9):
        a = remote(stub).generate(PROMPTS, 2, length, 0.0, (0,))
        b = own.generate(PROMPTS, 2, length, 0.0, (0,))
        assert a.prompts == b.prompts
        for name in ("tokens", "lengths", "finished_by_eos", "finished_by", "row_keys", "log_kept"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        torch.testing.assert_close(a.logprob, b.logprob)
    assert bool(a.finished_by_eos.any()) and not bool(a.finished_by_eos.all())


def test_samples_follow_their_keys_and_differ(vllm: Stub) -> None:
    rollout = remote(vllm)
    a, b = (rollout.generate(PROMPTS, 3, 8, 1.0, (1, "rollout", step)) for step in (1, 2))
    again = rollout.generate(PROMPTS[1:2], 1, 8, 1.0, (1, "rollout", 1), row_keys=a.row_keys[4:5])
    assert torch.equal(again.tokens[0], a.tokens[4])
    assert not torch.equal(a.tokens, b.tokens)
    assert len({tuple(row) for row in a.tokens.tolist()}) > 6


def test_the_request_leaves_nothing_to_the_servers_defaults(vllm: Stub) -> None:
    plain = remote(vllm).generate(PROMPTS[:1], 1, 2, 1.0, (0,))
    cut = remote(vllm).generate(PROMPTS[:1], 1, 2, 0.7, (0,), top_k=4, top_p=0.9, min_p=0.1)
    sent = [body for path, body in vllm.asked if path == "/v1/completions"]
    names = "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_token_ids"
    assert [[body[name] for name in names] for body in sent] == [
        [1.0, -1, 1.0, 0.0, 1.0, [0, 5]],
        [0.7, 4, 0.9, 0.1, 1.0, [0, 5]],
    ]
    assert plain.logprob is not None and cut.logprob is None and cut.log_kept is None


def test_prompts_that_do_not_fit_are_refused_before_any_request(vllm: Stub) -> None:
    rollout, asked = remote(vllm), len(vllm.asked)
    with pytest.raises(
        ContextError,
        match="61 tokens, and with 4 new ones exceeds the 64 of rollout.url, vllm .* Lower "
        r"rollout.max_new_tokens, take shorter prompts \(data\), .* --max-model-len",
    ):
        rollout.generate([[3] * 61], 1, 4, 0.0, (0,))
    rollout.check_fits([[3] * 60], 4)
    with pytest.raises(ContextError, match="60 tokens, and with 4 new ones and 1 beside them"):
        remote(vllm, spare=1).check_fits([[3] * 60], 4)
    with pytest.raises(ContextError, match="none may be empty"):
        rollout.generate([[3], []], 1, 4, 0.0, (0,))
    assert len(vllm.asked) == asked + 1


def _choice(**changes: Any) -> Any:
    def change(answer: Any) -> Any:
        for choice in answer.get("choices", ()):
            choice.update(changes)
        return answer

    return change


LOGPROBS = {"token_logprobs": [-1.0] * 3}
BAD = {
    "no ids": ({"token_ids": None}, "token_ids that are not from 0 to 31: None"),
    "out of range": ({"token_ids": [3, 32, 4]}, r"from 0 to 31: \[3, 32, 4\]"),
    "negative": ({"token_ids": [3, -1, 4]}, "from 0 to 31"),
    "no integer": ({"token_ids": [3, 2.5, 4]}, "from 0 to 31"),
    "a bool": ({"token_ids": [3, True, 4]}, "from 0 to 31"),
    "none": ({"token_ids": []}, "has 0 token_ids, asked for 1 to 3"),
    "too many": ({"token_ids": [3] * 4}, "has 4 token_ids, asked for 1 to 3"),
    "too few": ({"token_ids": [3, 4]}, "ends after 2 of 3 tokens with 4"),
    "an end of its own": (
        {"token_ids": [3, 4], "finish_reason": "stop"},
        r"with 4, finish_reason 'stop'; the tokens that end an answer here are \[0, 5\]",
    ),
    "aborted": ({"finish_reason": "abort"}, "finish_reason 'abort'"),
    "past the end": ({"token_ids": [3, 5, 4]}, "goes on after 5"),
    "few log-probs": ({"logprobs": {"token_logprobs": [-1.0]}}, "not a log-prob for each of 3"),
    "log-probs are NaN": (
        {"logprobs": {"token_logprobs": [-1.0, None, float("nan")]}},
        "not a log-prob for each",
    ),
    "no log-probs": ({"logprobs": None}, "has not one choice with"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_answer_is_an_error(vllm: Stub, name: str) -> None:
    changes, message = BAD[name]
    rollout = remote(vllm)
    usual = {"token_ids": [3, 4, 6], "finish_reason": "length", "logprobs": LOGPROBS}
    vllm.change = _choice(**usual)
    rollout.generate(PROMPTS[:1], 1, 3, 1.0, (0,))
    changes = {**usual, **changes}
    count = len(changes["token_ids"] or ())
    if changes["logprobs"] is LOGPROBS:
        changes["logprobs"] = {"token_logprobs": [-1.0] * count}
    vllm.change = _choice(**changes)
    with pytest.raises(ServerError, match=f"rollout.url: the answer of {vllm.url}.*{message}"):
        rollout.generate(PROMPTS[:1], 1, 3, 1.0, (0,))


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}]}, {"choices": 3}, [1]])
def test_an_answer_of_another_shape_is_an_error(vllm: Stub, answer: Any) -> None:
    rollout = remote(vllm)
    vllm.change = lambda _: answer
    with pytest.raises(ServerError, match="has not one choice|is not a JSON object"):
        rollout.generate(PROMPTS[:1], 1, 3, 1.0, (0,))
