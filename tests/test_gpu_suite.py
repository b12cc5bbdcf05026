"""The GPU suite runs to its end, fails where an op is wrong, and says so where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_kernels, gpu_suite, gpu_tables
from bench.gpu_timing import Clocks
from esr_kernels.common.calibration import read

ROOT = Path(__file__).parents[1]


def test_a_dry_run_checks_and_times_every_op(tmp_path):
    """In a process of its own: on PyTorch's path, which takes a second for all of it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "gpu.jsonl"
    rates = tmp_path / "rates.json"
    command = [sys.executable, "-m", "bench.gpu_suite", "--dry-run", "--out", str(out)]
    command += ["--calibration", str(rates)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
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
        "stash, T=150, several chunks",
        "stash, T=150, teacher_in_gradient",
    ):
        assert any(r["name"].startswith(op) for r in checked), op
    large = {r["name"].split(", ")[2].split()[0]: r for r in checked if r["name"][:5] == "stash"}
    assert large["several"]["chunks"] > 1 and large["teacher_in_gradient"]["teacher in gradient"]
    timed = [r for r in records if r["section"] == "time"]
    assert not [r for r in timed if "error" in r]
    for name in (
        "statistics, T=8",
        "draw, B=2 D=16: fused",
        "attention, 4 x 2 rows",
        "rates of plans",
        "step, D=32 teacher D=48, 2 x 2 responses of 3 tokens: TRL's loss",
        "step, D=32 teacher D=48, 2 x 2 responses of 6 tokens: ours",
        "rollout, D=48, 2 x 2 of 3 tokens: ours, without graphs",
        "rollout, D=32, 2 x 2 of 3 tokens: transformers generate",
    ):
        assert any(r["name"].startswith(name) for r in timed), name
    assert list(read(rates)) == ["none"]
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

    _measure(
        monkeypatch, [("check", ("a", wrong)), ("check", ("b", fine)), ("time", ("c", slow_peer))]
    )
    out = tmp_path / "gpu.jsonl"
    assert gpu_suite.main(["--dry-run", "--out", str(out)]) == 1
    first, second, third = (json.loads(line) for line in out.read_text().splitlines())
    assert second["ok"] and third["not installed"] == "no such package"
    assert first.get("error") == ("RuntimeError: out of memory" if broken == "raises" else None)
    _measure(monkeypatch, [("check", ("b", fine)), ("time", ("c", slow_peer))])
    assert gpu_suite.main(["--dry-run"]) == 0


def _measure(monkeypatch, *groups, seconds=100.0):
    made = [gpu_suite.Group(f"group {k}", seconds, parts) for k, parts in enumerate(groups)]
    monkeypatch.setattr(gpu_suite, "groups", lambda dry, calibration: made)


FINE = ("check", ("a", lambda: {"ok": True}))


def test_what_no_longer_fits_the_time_is_recorded_as_skipped(tmp_path, monkeypatch):
    _measure(monkeypatch, [FINE], [FINE], seconds=-1.0)
    out = tmp_path / "gpu.jsonl"
    assert gpu_suite.main(["--dry-run", "--out", str(out)]) == 1, "nothing was shown to be right"
    assert [json.loads(line)["error"] for line in out.read_text().splitlines()] == [
        "out of time",
        "out of time",
    ]


def test_a_group_may_use_the_time_that_those_before_it_leave(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu_suite.time, "perf_counter", lambda: now[0])

    def part(name, took):
        def run():
            now[0] += took

        return "time", (name, run)

    long = [part("b", 12.0), part("c", 4.0), part("d", 1.0)]
    groups = [gpu_suite.Group("first", 10, [part("a", 3.0)]), gpu_suite.Group("second", 8, long)]
    names = []
    for _, name, run in gpu_suite.started([*groups, gpu_suite.Group("third", 5, [part("e", 1.0)])]):
        names.append(name)
        if run is not None:
            run()
    assert names == ["a", "b", "c", "second: what is left of it", "e"]


def test_operands_that_do_not_fit_end_their_group_alone(tmp_path, monkeypatch):
    def parts():
        yield FINE
        raise torch.OutOfMemoryError("no room")

    _measure(monkeypatch, parts(), [FINE])
    out = tmp_path / "gpu.jsonl"
    assert gpu_suite.main(["--dry-run", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["name"] for r in records] == ["a", "group 0: operands", "a"]
    assert records[1]["error"] == "OutOfMemoryError: no room"


def test_clocks_and_power_come_from_nvidia_smi(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\nfor i in 1 2 3; do echo '1980, 2619, 650.5'; done\necho '[N/A]'\nsleep 9\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with Clocks() as clocks:
        for _ in range(100):
            read_so_far = clocks.during(0.0, time.perf_counter())
            if read_so_far:
                break
            time.sleep(0.05)
    assert read_so_far == {"SM MHz": 1980.0, "memory MHz": 2619.0, "W": 650.5}
    assert clocks.during(-2.0, -1.0) == {}


def test_without_nvidia_smi_no_clocks_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Clocks() as clocks:
        assert clocks.during(0.0, time.perf_counter()) == {}


def test_the_rates_of_the_fused_kernel_solve_its_two_times():
    rate, epilogue, per_byte, pairs = 0.4, 5.0, 200.0, 1e6
    times = [(f, f / (rate * per_byte) + epilogue * pairs) for f in (1e10, 3e10)]
    assert gpu_kernels._fused_rates(times, per_byte, pairs) == pytest.approx((rate, epilogue))
    noise = [(1e10, 1e8), (3e10, 4e8)]  # a negative epilogue
    assert gpu_kernels._fused_rates(noise, per_byte, pairs) == pytest.approx((4e10 / 5e8 / 200, 0))


def test_checks_that_time_cut_short_are_no_pass(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(gpu_suite.time, "perf_counter", lambda: now[0])

    def check():
        now[0] += 10.0
        return {"ok": True}

    parts = [("check", (name, check)) for name in "abc"]
    monkeypatch.setattr(
        gpu_suite, "groups", lambda dry, calibration: [gpu_suite.Group("checks", 15.0, parts)]
    )
    assert gpu_suite.main(["--dry-run"]) == 1
    assert "after 2 checks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "draws,nonsense"], "'nonsense' is none of checks"),
        (["--share", "0/3"], "1 <= K <= N"),
        (["--seconds", "-5"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--out", "/nowhere/x.jsonl"], "No such file or directory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        gpu_suite.main(["--dry-run", *arguments])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_calibration_file_that_cannot_be_read_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "rates.json").write_text("{")
    with pytest.raises(SystemExit):
        gpu_suite.main(["--dry-run", "--calibration", str(tmp_path / "rates.json")])
    assert "must hold JSON" in capsys.readouterr().err


def test_groups_and_shares_choose_parts(monkeypatch):
    made = [gpu_suite.Group(name, 10.0, list(range(5))) for name in ("first", "second")]
    [group] = gpu_suite.chosen(made, [" second"], (2, 3), 4.0)
    assert (group.name, group.seconds, list(group.parts)) == ("second", 4.0, [1, 4])
    assert [g.seconds for g in gpu_suite.chosen(made, None, (1, 1), None)] == [10.0, 10.0]


def test_the_groups_have_470_seconds_together():
    assert sum(group.seconds for group in gpu_suite.groups(False, None)) == 470


def test_a_damaged_record_is_named(tmp_path, monkeypatch):
    path = tmp_path / "gpu_x.jsonl"
    path.write_text('{"name": "a", "section": "check", "date": "2026", "ok": true}\n{"name": "b"')
    monkeypatch.setattr(gpu_tables, "_source", path)
    with pytest.raises(ValueError, match="gpu_x.jsonl, line 2 is no record"):
        gpu_tables.checks()


def test_the_committed_tile_of_the_first_runs_is_not_todays(tmp_path, monkeypatch):
    """That one loads by pointers, and today's by descriptors. A run that failed hides no other."""
    path, name = tmp_path / "gpu.jsonl", "fused tile: committed"
    monkeypatch.setattr(gpu_tables, "_source", path)
    runs = [
        {"tile": [128, 128, 64, 8, 4], "ms": 25.4},
        {"tile": [128, 128, 64, 8, 4, False], "ms": 25.2},
        {"tile": [128, 128, 64, 8, 5, True], "ms": 20.8},
        {"error": "statistics differ"},
    ]
    runs = [
        {"name": name, "date": str(k), "section": "variant", **run} for k, run in enumerate(runs)
    ]
    found = []
    for last in range(1, 5):
        path.write_text("\n".join(map(json.dumps, runs[:last])))
        found.append(gpu_tables.records().get(name))
    assert found == [None, None, runs[2], runs[2]]
