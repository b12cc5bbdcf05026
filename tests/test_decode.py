"""Capturing a decoding step, with stand-ins for CUDA's graph: what a CPU can tell of it."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch

from esr_train.decode import CapturedStep


class _Graph:
    """A CUDA graph as far as `CapturedStep` sees one; it counts its replays."""

    made: ClassVar[list[_Graph]] = []

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        pass


@pytest.fixture
def _cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _Graph.made.clear()
    for name, stand_in in {
        "CUDAGraph": _Graph,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": nullcontext,
        "graph": nullcontext,
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.usefixtures("_cuda_without_a_gpu")
def test_the_third_step_is_captured_and_all_after_are_replays() -> None:
    calls: list[int] = []
    step = CapturedStep(lambda: calls.append(len(_Graph.made)), capture=True)
    for _ in range(7):
        step()
    # Two as they are, one that is recorded; it and the four after it are replayed.
    assert calls == [0, 0, 1]
    [graph] = _Graph.made
    assert graph.replays == 5


@pytest.mark.usefixtures("_cuda_without_a_gpu")
def test_a_step_that_cannot_be_captured_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def function() -> None:
        capturing = len(_Graph.made) == 1 and "refused" not in calls
        calls.append("refused" if capturing else "ran")
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    step = CapturedStep(function, capture=True)
    with caplog.at_level(logging.WARNING, "esr_train"):
        for _ in range(5):
            step()
    assert calls == ["ran", "ran", "refused", "ran", "ran", "ran"]
    assert "decoding without a CUDA graph: operation not permitted" in caplog.text
