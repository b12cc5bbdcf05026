"""The GPU suite runs to its end, fails where an op is wrong, and says so where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_suite

ROOT = Path(__file__).parents[1]


def test_a_dry_run_checks_and_times_every_op(tmp_path):
    """In a process of its own: on PyTorch's path, which takes a second for all of it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "bench.gpu_suite", "--dry-run", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    checked = [r for r in records if r["section"] == "check"]
    assert all(r["ok"] for r in checked)
    for op in (
        "linear_divergence",
        "token_logprob",
        "linear_topk_divergence",
        "sample_from_hidden",
        "shared_prefix_attention",
    ):
        assert any(r["name"].startswith(op) for r in checked), op
    timed = [r for r in records if r["section"] == "time"]
    assert not [r for r in timed if "error" in r]
    ours = next(r for r in timed if r["name"].endswith("ours, stash"))
    assert 0 < ours["ms p10"] <= ours["ms"] <= ours["ms p90"] and ours["runs"] >= 3
    assert {"gpu", "driver", "torch", "triton", "commit", "date"} <= set(ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2(capsys):
    assert gpu_suite.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_a_failing_check_is_recorded_the_rest_goes_on_and_the_status_is_1(
    broken, tmp_path, monkeypatch
):
    def wrong():
        if broken == "raises":
            raise RuntimeError("out of\nmemory")
        return {"dX": 1.0, "ok": False}

    def fine():
        return {"dX": 0.0, "ok": True}

    def slow_peer():
        raise ImportError("no such package")

    parts = [("check", ("a", wrong)), ("check", ("b", fine)), ("time", ("c", slow_peer))]
    monkeypatch.setattr(gpu_suite, "parts", lambda dry: iter(parts))
    out = tmp_path / "gpu.jsonl"
    assert gpu_suite.main(["--dry-run", "--out", str(out)]) == 1
    first, second, third = (json.loads(line) for line in out.read_text().splitlines())
    assert second["ok"] and third["not installed"] == "no such package"
    assert first.get("error") == ("RuntimeError: out of memory" if broken == "raises" else None)
    parts = [("check", ("b", fine)), ("time", ("c", slow_peer))]
    monkeypatch.setattr(gpu_suite, "parts", lambda dry: iter(parts))
    assert gpu_suite.main(["--dry-run"]) == 0


def test_what_no_longer_fits_the_time_is_recorded_as_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_DEADLINE_SECONDS", -1)
    monkeypatch.setattr(
        gpu_suite, "parts", lambda dry: iter([("check", ("a", lambda: {"ok": True}))])
    )
    out = tmp_path / "gpu.jsonl"
    assert gpu_suite.main(["--dry-run", "--out", str(out)]) == 1, "nothing was shown to be right"
    assert "out of time" in json.loads(out.read_text())["error"]
