"""Requests that fail: which are sent again, and what an error says."""

from __future__ import annotations

import socket
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


def called(stub: Stub, model: str, served_name: str | None = None) -> Server:
    return Server("rollout.url", f"{stub.url}/v1/", model, RuntimeConfig(), served_name)


def test_a_model_is_found_by_its_name_or_where_it_was_loaded_from(vllm: Stub) -> None:
    vllm.models = [
        {"id": "base", "root": "/models/Qwen3-8B", "owned_by": "vllm"},
        {"id": "tiny", "owned_by": "vllm"},
    ]
    for model, found in (
        ("tiny", "tiny"),
        ("./tiny/", "tiny"),
        ("base", "base"),
        ("/models/Qwen3-8B", "base"),
        ("Qwen/Qwen3-8B", "base"),
    ):
        assert called(vllm, model).model == found
    assert called(vllm, "Qwen/Qwen3-8B", "tiny").model == "tiny"
    vllm.models.reverse()
    assert called(vllm, "base").note == (
        f"rollout.url: vllm at {vllm.url} serves 'base' (of /models/Qwen3-8B)"
    )


@pytest.mark.parametrize("names", [["base", "tiny"], ["base"]], ids=["several", "one"])
def test_another_model_is_refused_by_the_names_there(vllm: Stub, names: list[str]) -> None:
    vllm.models = [{"id": name, "root": f"/models/{name}"} for name in names]
    listed = ", ".join(f"'{name}' .of /models/{name}." for name in names)
    with pytest.raises(
        ConfigError,
        match=f"rollout.url: {vllm.url} serves {listed}; none is called 'b/Qwen3-4B'. "
        "If one .* give its name as rollout.served_name",
    ):
        called(vllm, "b/Qwen3-4B")
    with pytest.raises(ConfigError, match=f"rollout.served_name: got 'x', and .* serves {listed}"):
        called(vllm, "base", "x")


def test_an_adapter_is_asked_for_by_its_name_in_the_context_of_its_base(stub: Stub) -> None:
    base = {"id": "base", "owned_by": stub.kind, "max_model_len": 64}
    adapter = {"id": "tiny", "root": "/a", "parent": "base", "owned_by": stub.kind}
    stub.models = [base, {**adapter, "max_model_len": None}]
    server = called(stub, "base", "tiny")
    assert (server.model, server.max_tokens) == ("tiny", 64)
    post(server)
    sent = {name: stub.asked[-1][1].get(name) for name in ("model", "lora_path")}
    # SGLang selects no adapter by `model`.
    assert sent == {"model": "tiny", "lora_path": "tiny" if stub.kind == "sglang" else None}


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


def test_https_to_a_server_of_http_fails_at_once(vllm: Stub) -> None:
    with pytest.raises(ServerError, match="cannot be asked for its models: .*http, not https?"):
        Server("teacher.url", vllm.url.replace("http", "https"), "tiny", RuntimeConfig())
    assert not vllm.asked


def test_an_address_of_another_service_fails_at_once(vllm: Stub) -> None:
    vllm.faults = ["garbage"]
    with pytest.raises(ServerError, match="its models: no JSON, but '<html>'; is it the address"):
        connect(vllm)
    assert len(vllm.asked) == 1


def test_an_unknown_host_fails_at_once_but_is_waited_for_later(
    vllm: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, unknown = socket.getaddrinfo, [True]

    def lookup(*what: Any, **how: Any) -> Any:
        if unknown:
            unknown.pop()
            raise socket.gaierror(-2, "Name or service not known")
        return known(*what, **how)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(ServerError, match="Name or service not known; is the host's name right"):
        connect(vllm)
    with pytest.raises(ServerError, match="codec failed.*; is the host's name right"):
        Server("teacher.url", f"http://{'a' * 64}.example", "tiny", RuntimeConfig())
    server = connect(vllm)
    unknown.append(True)
    assert post(server)["choices"] and not unknown


def test_waiting_is_said_once_for_all_requests(
    vllm: Stub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = connect(vllm)
    for quiet in (60.0, 0.0):  # in between, a minute has passed
        monkeypatch.setattr("esr_train.remote.client.SAID_EVERY", quiet)
        caplog.clear()
        vllm.faults = [503] * (TRIES - 1)
        server.each(lambda _: post(server), range(6))
        said = caplog.messages
        assert (len(said) == 1) == bool(quiet)
        assert said[0].startswith(f"teacher.url: {vllm.url}/v1/completions gives no answer to a re")
        assert "a token: HTTP 503: " in said[0]
        assert said[0].endswith("; asking again after 0.001, 0.002, 0.004, 0.008, 0.016 s")
