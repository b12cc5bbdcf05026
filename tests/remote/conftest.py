"""A stub server, and a client that does not wait long before it tries again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from esr_train.remote import client
from tests.remote.stub import Stub, serving
from tests.tiny import save_pair, tiny_llama


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "DELAY", 0.001)


@pytest.fixture(params=["vllm", "sglang"])
def stub(request: pytest.FixtureRequest) -> Iterator[Stub]:
    with serving(tiny_llama(1), request.param) as found:
        yield found


@pytest.fixture
def vllm() -> Iterator[Stub]:
    with serving(tiny_llama(1)) as found:
        yield found


@pytest.fixture
def same(tmp_path: Path) -> str:
    """A teacher with the student's vocabulary; the stub's model is of the same seed."""
    return save_pair(tmp_path / "teacher", seed=1)
