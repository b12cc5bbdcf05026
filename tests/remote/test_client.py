"""Requests that fail: which are sent again, and what an error says."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from esr_train.config import ConfigError, RuntimeConfig
from esr_train.remote.client import TRIES, Server, ServerError
from tests.remote.stub import Stub

BODY = {"prompt": [3, 4], "max_tokens": 1, "temperature": 0.0}


def connect(stub: Stub, **runtime: Any) -> Server:
    return Server("teacher.url", stub.url, "tiny", RuntimeConfig(**runtime))


def post(server: Server) -> Any:
    return server.post("/v1/completions", BODY, "a token")


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "garbage", "drop", 0.6])
def test_a_passing_fault_is_tried_again(vllm: Stub, fault: Any) -> None:
    server = connect(vllm, request_seconds=0.3)
    expected = post(server)
    vllm.faults = [fault] * (1 if isinstance(fault, float) else TRIES - 1)
    assert post(server) == expected and not vllm.faults


@pytest.mark.parametrize("fault", [500, "garbage", "drop"])
def test_a_lasting_fault_names_server_request_and_way_out(vllm: Stub, fault: Any) -> None:
    server = connect(vllm)
    vllm.faults = [fault] * TRIES
    said = {500: "HTTP 500: .*of the stub", "garbage": "no JSON", "drop": "closed|reset"}[fault]
    where = f"teacher.url: {vllm.url}/v1/completions gave no answer to a request for a token"
    with pytest.raises(ServerError, match=f"{where}, tried {TRIES} times in .*({said}).* again"):
        post(server)
    assert len(vllm.asked) == 1 + TRIES


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_the_server_refuses_is_not_sent_again(vllm: Stub, status: int) -> None:
    server = connect(vllm)
    vllm.faults = [status]
    with pytest.raises(ServerError, match=f"refuses a request for a token: HTTP {status}: .*stub"):
        post(server)
    assert len(vllm.asked) == 2


def test_a_time_out_is_an_error(vllm: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esr_train.remote.client.TRIES", 2)
    server = connect(vllm, request_seconds=0.1)
    vllm.faults = [0.3] * 2
    with pytest.raises(ServerError, match="tried 2 times .*timed out"):
        post(server)


def test_no_server_is_an_error(vllm: Stub) -> None:
    vllm.server_close()
    with pytest.raises(ServerError, match="a request for its models, .*refused"):
        connect(vllm)


def test_a_server_with_several_models_is_asked_by_name(vllm: Stub) -> None:
    vllm.models = [{"id": "base", "owned_by": "vllm"}, {"id": "tiny", "owned_by": "vllm"}]
    assert connect(vllm).model == "tiny"
    assert Server("rollout.url", f"{vllm.url}/v1/", "base", RuntimeConfig()).model == "base"
    with pytest.raises(
        ConfigError, match=r"has several models, \['base', 'tiny'\], and none .*'x'"
    ):
        Server("rollout.url", vllm.url, "x", RuntimeConfig())


@pytest.mark.parametrize("models", [[], [{}], "none", [3]])
def test_a_server_without_models_is_an_error(vllm: Stub, models: Any) -> None:
    vllm.models = models
    with pytest.raises(ServerError, match="/v1/models lists no models"):
        connect(vllm)


def test_requests_at_a_time_are_bounded_and_answers_in_order(vllm: Stub) -> None:
    server = connect(vllm, requests=3)
    lock, now, most = threading.Lock(), 0, 0

    def double(number: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01 * (5 - number % 5))
        with lock:
            now -= 1
        return 2 * number

    assert server.each(double, range(20)) == [2 * number for number in range(20)]
    assert most == 3
    assert server.each(double, []) == []


def test_an_error_does_not_wait_for_the_others(vllm: Stub) -> None:
    server = connect(vllm, request_seconds=30.0)
    vllm.faults = [400, *[5.0] * 7]

    start = time.monotonic()
    with pytest.raises(ServerError, match="HTTP 400"):
        server.each(lambda _: post(server), range(8))
    assert time.monotonic() - start < 3


def test_the_key_of_a_server_is_sent(vllm: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("ESR_API_KEY", "secret")
    real = vllm.RequestHandlerClass.do_GET
    monkeypatch.setattr(
        vllm.RequestHandlerClass,
        "do_GET",
        lambda self: (seen.append(self.headers["Authorization"]), real(self)),
    )
    connect(vllm)
    assert seen == ["Bearer secret"]


@pytest.mark.parametrize("secret", ["sk\nbad", "sch\u00fcssel"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    secret: str, vllm: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESR_API_KEY", secret)
    with pytest.raises(ConfigError, match="ESR_API_KEY: must be printable ASCII") as caught:
        connect(vllm)
    assert secret not in str(caught.value) and not vllm.asked


def test_a_refused_key_is_named(vllm: Stub) -> None:
    server = connect(vllm)
    vllm.faults = [401]
    with pytest.raises(ServerError, match="HTTP 401.*ESR_API_KEY"):
        post(server)
