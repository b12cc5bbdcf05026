"""A server with a tiny model that answers as vLLM or SGLang do, and fails as it is told."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Answer = dict[str, Any]


class Stub(ThreadingHTTPServer):
    """`faults` are used up, one a request: an HTTP status, "garbage", "drop", or seconds of sleep.
    `change` is called with each answer. After `dies_after` requests the server is gone."""

    daemon_threads = True

    def __init__(self, model: Any, kind: str = "vllm", port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model, self.kind = model, kind
        card = {"id": "tiny", "root": "/models/teacher", "owned_by": kind, "max_model_len": 64}
        self.models: list[Answer] = [card]
        self.max_logprobs = 1000
        self.faults: list[Any] = []
        self.change: Callable[[Answer], Any] = lambda answer: answer
        self.dies_after: int | None = None
        self.asked: list[tuple[str, Answer]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""

    def answer(self, path: str, body: Answer) -> Answer:
        if path == "/v1/models":
            return {"object": "list", "data": self.models}
        if path == "/generate" and self.kind == "sglang":
            return self._generate(body)
        assert path == "/v1/completions" and body["model"] == "tiny"
        return self._completion(body)

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Tensor:
        with self.lock:
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def _completion(self, body: Answer) -> Answer:
        prompt, ids, values, reason = body["prompt"], [], [], "length"
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        for _ in range(body["max_tokens"]):
            last, temperature = self.logprobs(prompt + ids)[-1], body["temperature"]
            token = int(last.argmax())
            if temperature:
                scaled = (last / temperature).softmax(-1)
                token = int(torch.multinomial(scaled, 1, generator=generator))
            ids.append(token)
            values.append(float(last[token]))
            if token in body.get("stop_token_ids", ()):
                reason = "stop"
                break
        choice: Answer = {"index": 0, "text": "?", "finish_reason": reason}
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": values}
        if self.kind == "vllm" and body.get("prompt_logprobs"):
            choice["prompt_logprobs"] = self._of_prompt(prompt, body["prompt_logprobs"])
        return {"choices": [choice]}

    def _of_prompt(self, prompt: list[int], count: int) -> list[Any]:
        found: list[Any] = [None]
        for row, token in zip(self.logprobs(prompt)[:-1], prompt[1:], strict=True):
            top = row.topk(min(count, self.max_logprobs))
            named = {token: float(row[token])}
            named |= dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            found.append({str(index): {"logprob": value} for index, value in named.items()})
        return found

    def _generate(self, body: Answer) -> Answer:
        ids, start = body["input_ids"], body["logprob_start_len"]
        assert body["return_logprob"] and start == 0
        tokens, tops = [[None, ids[0], None]], [None]
        for row, token in zip(self.logprobs(ids)[:-1], ids[1:], strict=True):
            top = row.topk(min(body["top_logprobs_num"], self.max_logprobs))
            tokens.append([float(row[token]), token, None])
            tops.append(
                [
                    [value, index, None]
                    for value, index in zip(*map(Tensor.tolist, top), strict=True)
                ]
            )
        return {"meta_info": {"input_token_logprobs": tokens, "input_top_logprobs": tops}}


class _Handler(BaseHTTPRequestHandler):
    server: Stub
    disable_nagle_algorithm = True  # head and body of an answer are two writes

    def do_GET(self) -> None:
        self._do({})

    def do_POST(self) -> None:
        self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _do(self, body: Answer) -> None:
        stub = self.server
        with stub.lock:
            stub.asked.append((self.path, body))
            fault = stub.faults.pop(0) if stub.faults else None
            dead = stub.dies_after is not None and len(stub.asked) > stub.dies_after
            stub.at_once += 1
            stub.most_at_once = max(stub.most_at_once, stub.at_once)
        try:
            if dead:
                stub.socket.close()
            if dead or fault == "drop":
                return self.connection.close()
            if isinstance(fault, float):
                time.sleep(fault)
            status = fault if isinstance(fault, int) else 200
            text = json.dumps(stub.change(stub.answer(self.path, body)))
            text = {200: text}.get(status, '{"error": "of the stub"}')
            sent = b"<html>" if fault == "garbage" else text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)
        finally:
            with stub.lock:
                stub.at_once -= 1

    def log_message(self, *what: Any) -> None:
        pass


@contextlib.contextmanager
def serving(model: Any, kind: str = "vllm", port: int = 0) -> Iterator[Stub]:
    """A stub in a thread."""
    stub = Stub(model, kind, port)
    threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
