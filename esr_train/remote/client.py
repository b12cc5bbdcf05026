"""Requests to a server that speaks OpenAI's completions API."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

from esr_train.config import ConfigError, RuntimeConfig

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)

TRIES = 6
DELAY = 1.0  # seconds before the second try; twice as long before each following one
SAID_EVERY = 60.0  # seconds between lines that say that a server is waited for
_SHOWN = 300  # characters of what a server says that go into an error


class ServerError(ConnectionError):
    """A server that does not answer, or with what cannot be used; the message says which."""


class Server:
    """A model at a URL.

    Args:
        key: of the configuration, which errors name.
        url: with or without /v1 at its end.
        model: what the server's model must be called there, or be loaded from; the last part of a
            path is enough.
        served_name: its name there, whatever `model` is; None if none is given.

    $ESR_API_KEY is sent as the bearer token, if it is set.

    Raises:
        ServerError: it does not answer.
        ConfigError: it has no model of that name; $ESR_API_KEY cannot be sent.
    """

    def __init__(
        self, key: str, url: str, model: str, runtime: RuntimeConfig, served_name: str | None = None
    ) -> None:
        token = os.environ.get("ESR_API_KEY", "")
        if not (token.isascii() and token.isprintable()):
            raise ConfigError(
                "ESR_API_KEY: must be printable ASCII characters (it is not shown here)"
            )
        self.key, self.runtime, self._token = key, runtime, token
        self.base = url.rstrip("/").removesuffix("/v1")
        self._known = False  # has answered once
        self._said, self._lock = -math.inf, threading.Lock()  # when it was said that they wait
        listed = self._ask("/v1/models", None, "its models")
        try:
            models = [{**found, "id": str(found["id"])} for found in listed["data"]]
        except (KeyError, TypeError):
            models = []
        if not models:
            raise self.error("/v1/models", f"lists no models: {short(listed)}")
        found = _chosen(models, model, served_name)
        if found is None:
            setting = key.partition(".")[0] + ".served_name"
            serves = f"{self.base} serves {', '.join(map(_named, models))}"
            if served_name is not None:
                raise ConfigError(f"{setting}: got {served_name!r}, and {serves}")
            raise ConfigError(
                f"{key}: {serves}; none is called {model!r}. If one of them is that model, give "
                f"its name as {setting}"
            )
        self.model: str = found["id"]
        self.kind = str(found.get("owned_by") or "a server")  # vllm, sglang
        # An adapter is listed with the model that it is for, whose context is its own.
        base = next((one for one in models if one["id"] == found.get("parent")), found)
        self.max_tokens: int | None = base.get("max_model_len")  # of prompt and answer together
        self._asked_of = {"model": self.model}
        if self.kind == "sglang" and base is not found:
            self._asked_of["lora_path"] = self.model  # it takes no adapter by `model`
        context = f", {self.max_tokens} tokens of context" if self.max_tokens else ""
        # What it says that it has, for the start of a run.
        self.note = f"{key}: {self.kind} at {self.base} serves {_named(found)}{context}"

    def __str__(self) -> str:
        return f"{self.kind} at {self.base}, model {self.model}"

    def post(self, path: str, body: dict[str, Any], what: str) -> dict[str, Any]:
        """The JSON object that the server answers with; `what` is asked for, for an error.

        Raises:
            ServerError: no answer after `TRIES`, or the server refuses the request.
        """
        answer = self._ask(path, {**self._asked_of, **body}, what)
        if not isinstance(answer, dict):
            raise self.error(path, f"is not a JSON object: {short(answer)}")
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
            try:
                seconds = self.runtime.request_seconds
                with urllib.request.urlopen(request, timeout=seconds) as answer:
                    said = answer.read()
            except urllib.error.HTTPError as error:
                problem, advice = f"HTTP {error.code}: {_said(error)}", ""
                if error.code < 500 and error.code not in (408, 429):
                    hint = "; ESR_API_KEY is sent as its key" if error.code in (401, 403) else ""
                    raise ServerError(
                        f"{self.key}: {url} refuses a request for {what}: {problem}{hint}"
                    ) from error
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                problem, advice = str(cause) or type(error).__name__, _advice(cause)
            else:
                with contextlib.suppress(ValueError):
                    found = json.loads(said)
                    self._known = True
                    return found
                problem = f"no JSON, but {short(said.decode(errors='replace'))!r}"
                advice = "is it the address of a server of models?"
            if advice and not self._known:
                raise ServerError(
                    f"{self.key}: {url} cannot be asked for {what}: {problem}; {advice}"
                )
            if number + 1 < TRIES:
                self._wait(number, f"{url} gives no answer to a request for {what}: {problem}")
        raise ServerError(
            f"{self.key}: {url} gave no answer to a request for {what}, tried {TRIES} times in "
            f"{time.monotonic() - start:.0f} s; at last: {problem}. Start the server again, then "
            "give the same command, which goes on from what is saved; the address may be another"
        )

    def _wait(self, number: int, problem: str) -> None:
        """After try `number`, from 0; says so, once for all requests that fail at the time."""
        with self._lock:
            now = time.monotonic()
            new = now - self._said > SAID_EVERY
            self._said = now if new else self._said
        if new:
            after = ", ".join(f"{DELAY * 2**n:g}" for n in range(TRIES - 1))
            logger.warning("%s: %s; asking again after %s s", self.key, problem, after)
        time.sleep(DELAY * 2**number)


def _advice(cause: Any) -> str:
    """What to do about an error that no other try mends; empty if one may."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "SSL_CERT_FILE can name the certificates that are trusted"
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
        return "does it speak http, not https?"
    if isinstance(cause, (socket.gaierror, UnicodeError)):
        return "is the host's name right, and known on this machine?"
    return ""


def _chosen(
    models: list[dict[str, Any]], model: str, served_name: str | None
) -> dict[str, Any] | None:
    if served_name is not None:
        return next((found for found in models if found["id"] == served_name), None)
    for shown in (str, _last_part):
        for found in models:
            if shown(model) in (shown(found["id"]), shown(str(found.get("root")))):
                return found
    return None


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _named(found: dict[str, Any]) -> str:
    root = found.get("root")
    return f"{found['id']!r}" + (f" (of {root})" if root and root != found["id"] else "")


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return short(error.read().decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def short(value: Any) -> str:
    """What a server says, as much of it as an error shows."""
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
