"""Alarms on rows made by hand, in a run, on the console and in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from esr_train.alarms import MEANING, Alarms, Announcer
from esr_train.logprob_gap import logprob_gap
from esr_train.metrics import read_rows, repetition
from esr_train.report import write_report
from esr_train.rollout import RolloutBatch
from tests.report.runs import write_config, write_seed
from tests.test_train import build
from tests.tiny import MakeConfig

WELL = {
    "loss": 0.5,
    "student_entropy": 1.0,
    "teacher_entropy": 0.4,
    "eos_rate": 0.8,
    "repetition": 0.1,
    "logprob_gap": 0.01,
}


def raised(late: dict[str, float], early: dict[str, float] | None = None) -> list[str]:
    """The alarms of the last of ten steps, the first five like `early`, the others like `late`."""
    alarms, found = Alarms(), []
    for step in range(1, 11):
        row = {"step": step, **WELL, **((early or {}) if step <= 5 else late)}
        found.append(alarms.of_step(row))
    return found[-1]


@pytest.mark.parametrize(
    ("name", "late", "early", "near"),
    [
        ("not_finite", {"teacher_entropy": math.nan}, {}, {"teacher_entropy": 1e30}),
        ("not_finite", {"loss": math.inf}, {}, {"loss": -1e30}),
        ("entropy_collapse", {"student_entropy": 0.15}, {}, {"student_entropy": 0.25}),
        # As sure as the teacher is no collapse.
        (
            "entropy_collapse",
            {"student_entropy": 0.1},
            {},
            {"student_entropy": 0.1, "teacher_entropy": 0.15},
        ),
        ("eos_vanishing", {"eos_rate": 0.19}, {}, {"eos_rate": 0.21}),
        ("repetition", {"repetition": 0.51}, {}, {"repetition": 0.49}),
        ("repetition", {"repetition": 0.71}, {"repetition": 0.5}, {"repetition": 0.69}),
        ("logprobs_apart", {"logprob_gap": 0.11}, {}, {"logprob_gap": 0.09}),
        (
            "server_logprobs_apart",
            {"logprob_gap": 0.11, "engine": "vllm"},
            {},
            {"logprob_gap": 0.09, "engine": "vllm"},
        ),
    ],
)
def test_a_rule_fires_past_its_threshold_alone(
    name: str, late: dict[str, float], early: dict[str, float], near: dict[str, float]
) -> None:
    assert raised(late, early) == [name]
    assert raised(near, early) == raised({}) == []


def test_short_rollouts_that_never_ended_have_lost_no_eos() -> None:
    assert raised({"eos_rate": 0.0}, {"eos_rate": 0.1}) == []
    assert raised({"eos_rate": 0.0}, {"eos_rate": 0.2}) == ["eos_vanishing"]


def test_means_are_compared_once_there_are_two_of_them() -> None:
    alarms = Alarms()
    rows = [{"step": step, **WELL, "repetition": 0.0} for step in range(1, 6)]
    rows += [{"step": step, **WELL, "repetition": 1.0} for step in range(6, 11)]
    assert [alarms.of_step(row) for row in rows] == [[]] * 9 + [["repetition"]]
    # A resumed run goes on from the rows that there are.
    resumed = Alarms(rows[:9])
    assert resumed.of_step(rows[9]) == ["repetition"]
    # Rows of an earlier version lack what is compared.
    assert Alarms([{"step": step} for step in range(1, 8)]).of_step({"step": 8, **WELL}) == []


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        (0.9, 0.45, ["answers_to_the_cap"]),
        (0.9, 0.55, []),  # most still end
        (0.6, 0.45, []),  # most did not end much more often before
        (0.1, 0.0, []),
    ],
)
def test_answers_that_run_to_the_cap(first: float, later: float, expected: list[str]) -> None:
    alarms = Alarms()
    assert alarms.of_evaluation({"eos_rate": first}) == []
    assert alarms.of_evaluation({"heldout_kl": 1.0}) == []
    assert alarms.of_evaluation({"eos_rate": later}) == expected
    assert (
        Alarms([], [{"metrics": {"eos_rate": first}}]).of_evaluation({"eos_rate": later})
        == expected
    )


def test_repetition_counts_runs_of_four_tokens() -> None:
    tokens = torch.tensor(
        [[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    )
    ended = torch.zeros(3, dtype=torch.bool)
    batch = RolloutBatch([[1]] * 3, tokens, torch.tensor([8, 5, 1]), ended)
    assert repetition(batch) == pytest.approx(1 / 7)  # 5 + 2 runs, of which 1234 is there twice
    assert repetition(batch.select(torch.tensor([2]))) == 0.0


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_the_gap_is_that_of_weights_that_moved(
    make_config: MakeConfig, tmp_path: Path, temperature: float
) -> None:
    trainer = build(make_config(), tmp_path)
    batch = trainer.rollout.generate(trainer.prompts.prompts_for(1), 2, 6, temperature, (0,))
    assert logprob_gap(trainer.rollout, batch, temperature, None) < 1e-4
    weight = trainer.student.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight *= 1.5
    assert logprob_gap(trainer.rollout, batch, temperature, None) > 1e-2


def test_a_run_raises_writes_and_announces(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esr_train.train.logprob_gap", lambda *_: 0.5)
    said: list[str] = []
    announce = Announcer(said.append)
    config = make_config(steps=11, eval__every=0)
    build(config, tmp_path, on_step=lambda row, _: announce(row)).run()
    rows = read_rows(tmp_path / "metrics.jsonl")
    at = [row["step"] for row in rows if "logprobs_apart" in row["alarms"]]
    assert at == [1, 11], "every tenth step is measured"
    told = [line for line in said if "logprobs_apart" in line]
    assert told == [f"alarm logprobs_apart (step 1): {MEANING['logprobs_apart']}"]
    assert "alarm logprobs_apart: at 2 steps, from 1 to 11" in announce.counts()


def test_an_alarm_of_an_evaluation_is_announced_with_its_step(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    trainer = build(make_config(steps=2), tmp_path, on_step=lambda row, _: rows.append(row))
    rates = iter([1.0, 0.0])
    monkeypatch.setattr(trainer.evaluator, "evaluate", lambda: ({"eos_rate": next(rates)}, []))
    trainer.run()
    assert [row["alarms"] for row in rows] == [[], ["answers_to_the_cap"]]
    evals = read_rows(tmp_path / "evals.jsonl")
    assert [row["alarms"] for row in evals] == [[], ["answers_to_the_cap"]]


def test_the_report_names_alarms_with_first_step_and_count(tmp_path: Path) -> None:
    write_config(tmp_path, {"esr-10": 10})
    folder = write_seed(tmp_path, "esr-10", 0, [(0, 0, 0, 0.1), (20, 10, 2000, 0.95)])
    write_report(tmp_path)
    assert "Alarms" not in (tmp_path / "report.html").read_text()
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        row["alarms"] = ["repetition"] if row["step"] >= 7 else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(tmp_path)
    wanted = f"repetition, esr-10 seed 0: first at step 7, {len(rows) - 6} in all. more than half"
    assert wanted in (tmp_path / "report.html").read_text()
    assert f"- {wanted}" in (tmp_path / "report.md").read_text()


def test_the_table_of_rules_is_complete() -> None:
    text = (Path(__file__).parents[1] / "docs" / "alarms.md").read_text()
    assert [name for name in MEANING if f"| `{name}` |" not in text] == []
