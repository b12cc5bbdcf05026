"""The scaling curves: what is measured, and that figures and page are those of the records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bench import bench_linear_divergence, curve_figures, curves, peers

pytest.importorskip("trl")
pytest.importorskip("liger_kernel")


def test_a_size_has_all_contenders_and_the_plan_that_auto_takes() -> None:
    before = torch.get_num_threads()
    row = curves.at_size(16, 600, 1)
    assert torch.get_num_threads() == before
    assert list(row)[0] == "ours, auto" and row["ours, auto"]["plan"] == "stash"
    assert {"plain PyTorch", "ours, stash", "ours, recompute in 64 MB"} < set(row)
    assert len(row) == 6 and not any("compile" in name for name in row)
    assert row["plain PyTorch"]["over_plain"] == 1.0
    assert all(costs["seconds"] > 0 and costs["over_plain"] > 0 for costs in row.values())


def test_memory_is_what_a_call_takes_beyond_inputs_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = 64 * 2**20

    def wasteful(x: peers.Operands) -> torch.Tensor:
        torch.ones(held // 4)  # freed at once
        return peers.plain_pytorch(x)

    both = {"plain PyTorch": peers.plain_pytorch, "ours, auto": wasteful}
    monkeypatch.setattr(curves, "contenders", lambda: both)
    row = curves.at_size(8, 100, 1)
    if row["ours, auto"]["extra_mib"] is not None:
        assert row["ours, auto"]["extra_mib"] == pytest.approx(64, abs=2)
        assert row["plain PyTorch"]["extra_mib"] < 2


def test_a_contender_with_another_loss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: peers.Operands) -> torch.Tensor:
        return 2 * peers.plain_pytorch(x)

    wrong = {"plain PyTorch": peers.plain_pytorch, "other": doubled}
    monkeypatch.setattr(curves, "contenders", lambda: wrong)
    with pytest.raises(RuntimeError, match="^other: loss .*, of plain PyTorch "):
        curves.at_size(8, 100, 1)


@pytest.mark.slow
def test_a_step_is_measured_at_every_length() -> None:
    tiny = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    table = curves.by_response((2, 4), 1, tiny)
    assert list(table) == ["2", "4"] and table["4"]["TRL"]["over_full"] == 1.0
    for row in table.values():
        assert list(row) == ["esr_train", "TRL"]
        assert all(0 < costs["rollout_seconds"] < costs["seconds"] for costs in row.values())


def _write(folder: Path, date: str) -> None:
    loss = {"seconds": 1.0, "over_plain": 0.5, "extra_mib": 20.0}
    step = {"seconds": 1.0, "over_full": 0.5, "peak_mib": 900.0}
    rows = {
        "tokens": dict.fromkeys("abcdef", loss),
        "vocabulary": dict.fromkeys("abcdef", loss),
        "response": dict.fromkeys("ab", step),
    }
    with (folder / "curves_cpu.jsonl").open("a") as file:
        for curve, row in rows.items():
            table = {"64": row, "128": row}
            line = {"date": date, "problem": f"by {curve}", "curve": curve, "table": table}
            file.write(json.dumps(line) + "\n")


def test_figures_are_the_same_from_the_same_records_and_carry_their_date(tmp_path: Path) -> None:
    _write(tmp_path, "2026-01-01")
    _write(tmp_path, "2026-01-02")
    made = []
    for name in ("first", "second"):
        curve_figures.draw(tmp_path / name, tmp_path)
        made.append({path.name: path.read_text() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1] and sorted(made[0]) == sorted(f"{n}.svg" for n in curves.CURVES)
    for name in curves.CURVES:
        record = curve_figures.newest(name, tmp_path)
        assert record is not None and record["date"] == "2026-01-02"
    assert all("2026-01-02" in text and "2026-01-01" not in text for text in made[0].values())
    assert "by tokens" in made[0]["tokens.svg"]


@pytest.mark.parametrize("name", curves.CURVES)
def test_the_committed_figures_are_of_the_newest_records(name: str) -> None:
    record = curve_figures.newest(name)
    if record is None:
        assert "There is no record yet" in curve_figures.block(name)
        return
    svg = (curve_figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert f">{record['date']}<" in svg, "run python -m bench.curves --draw"
    assert record["problem"] == curves.CURVES[name][0]


def test_the_page_of_results_says_what_the_benchmark_requires() -> None:
    page = (curve_figures.ROOT / "docs/results.md").read_text(encoding="utf-8")
    said = re.search(
        r"at most (\S+) of the time and half of the memory of plain PyTorch,\s+TRL and Liger, and "
        r"at most (\S+) times the time and (\S+) of the memory of what torch.compile makes",
        page,
    )
    assert said is not None
    eager, compiled = bench_linear_divergence.BOUNDS["ours, stash"].values()
    assert (float(said[1]), 0.5) == eager
    assert (float(said[2]), float(said[3])) == compiled
