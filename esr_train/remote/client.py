"""Requests to a server that speaks OpenAI's completions API."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

from esr_train.config import ConfigError, RuntimeConfig

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

TRIES = 6
DELAY = 1.0  # seconds before the second try; twice as long before each following one
_SHOWN = 300  # characters of what a server says that go into an error


class ServerError(ConnectionError):
    """A server that does not answer, or with what cannot be used; the message says which."""


class Server:
    """The model at a URL.

    Args:
        key: of the configuration, which errors name.
        url: with or without /v1 at its end.
        model: its name there, or the path that it was loaded from; wanted where a server has
            several.

    $ESR_API_KEY is sent as the bearer token, if it is set.

    Raises:
        ServerError: it does not answer.
        ConfigError: it has several models, and none of that name; $ESR_API_KEY cannot be sent.
    """

    def __init__(self, key: str, url: str, model: str, runtime: RuntimeConfig) -> None:
        token = os.environ.get("ESR_API_KEY", "")
        if not (token.isascii() and token.isprintable()):
            raise ConfigError(
                "ESR_API_KEY: must be printable ASCII characters (it is not shown here)"
            )
        self.key, self.runtime, self._token = key, runtime, token
        self.base = url.rstrip("/").removesuffix("/v1")
        listed = self._ask("/v1/models", None, "its models")
        try:
            models = [{**found, "id": str(found["id"])} for found in listed["data"]]
        except (KeyError, TypeError):
            models = []
        if not models:
            raise self.error("/v1/models", f"lists no models: {_short(listed)}")
        named = [found for found in models if model in (found["id"], found.get("root"))]
        if len(models) > 1 and not named:
            raise ConfigError(
                f"{key}: {self.base} has several models, {[found['id'] for found in models]}, and "
                f"none is called {model!r}"
            )
        found = (named or models)[0]
        self.model: str = found["id"]
        self.kind = str(found.get("owned_by") or "a server")  # vllm, sglang
        self.max_tokens: int | None = found.get("max_model_len")  # of prompt and answer together

    def __str__(self) -> str:
        return f"{self.kind} at {self.base}, model {self.model}"

    def post(self, path: str, body: dict[str, Any], what: str) -> dict[str, Any]:
        """The JSON object that the server answers with; `what` is asked for, for an error.

        Raises:
            ServerError: no answer after `TRIES`, or the server refuses the request.
        """
        answer = self._ask(path, {"model": self.model, **body}, what)
        if not isinstance(answer, dict):
            raise self.error(path, f"is not a JSON object: {_short(answer)}")
        return answer

    def each(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """`function` of each item, in order, at most `runtime.requests` at a time."""
        items = list(items)
        if not items:
            return []
        # Its threads are daemons: an error or Ctrl-C does not wait for requests on the way.
        with ThreadPool(min(self.runtime.requests, len(items))) as threads:
            # Not in order: the first error is raised when it happens.
            numbered = threads.imap_unordered(lambda n: (n, function(items[n])), range(len(items)))
            return [result for _, result in sorted(numbered, key=lambda pair: pair[0])]

    def error(self, path: str, problem: str) -> ServerError:
        """What is wrong with an answer."""
        return ServerError(f"{self.key}: the answer of {self.base}{path} {problem}")

    def _ask(self, path: str, body: dict[str, Any] | None, what: str) -> Any:
        url, start = self.base + path, time.monotonic()
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        for number in range(TRIES):
            if number:
                time.sleep(DELAY * 2 ** (number - 1))
            try:
                seconds = self.runtime.request_seconds
                with urllib.request.urlopen(request, timeout=seconds) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_said(error)}"
                if error.code < 500 and error.code not in (408, 429):
                    hint = "; ESR_API_KEY is sent as its key" if error.code in (401, 403) else ""
                    raise ServerError(
                        f"{self.key}: {url} refuses a request for {what}: {problem}{hint}"
                    ) from error
            except ValueError as error:
                problem = f"no JSON: {error}"
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise ServerError(
            f"{self.key}: {url} gave no answer to a request for {what}, tried {TRIES} times in "
            f"{time.monotonic() - start:.0f} s; at last: {problem}. Start the server again, then "
            "give the same command, which goes on from what is saved; the address may be another"
        )


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return _short(error.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
