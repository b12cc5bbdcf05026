"""Cascading alignment, on values in which a change was put at a known place, and on whole runs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from esr_train.config import with_overrides
from esr_train.diagnose import cascade
from esr_train.diagnose.bench import Trained
from esr_train.diagnose.measure import TokenValues
from tests.diagnose.chains import chain_config, kl, path
from tests.diagnose.test_measure import FORK, open_bench

PROBLEMS, LENGTH, WINDOW = 30, 16, 4


def _values(kl: np.ndarray) -> TokenValues:
    """Values whose divergences and log-ratios are all `kl`."""
    found = {field.name: kl for field in fields(TokenValues)}
    return TokenValues(**found | {"teacher_logprob": np.zeros_like(kl)})


def _bench(before: np.ndarray, after: list[np.ndarray]) -> SimpleNamespace:
    answers = SimpleNamespace(lengths=np.array([LENGTH]))
    values = _values(before)
    return SimpleNamespace(
        edges=[0, WINDOW, LENGTH],
        samples=1,
        on_student=values,
        on_teacher=values,
        trained=[
            Trained("esr", seed, WINDOW, 3, answers, *[_values(x)] * 3)
            for seed, x in enumerate(after)
        ],
    )


@pytest.fixture(scope="module")
def before() -> np.ndarray:
    """Problems of very unequal difficulty; half of the answers end within the window."""
    rng = np.random.default_rng(0)
    values = 1.0 + rng.gamma(1.0, 2.0, size=(PROBLEMS, 1)) + np.zeros((PROBLEMS, LENGTH))
    values[::2, WINDOW:] = np.nan
    return values


@pytest.mark.parametrize("beyond", [0.0, -0.2], ids=["window alone", "beyond it too"])
def test_a_change_is_found_where_it_was_put(before: np.ndarray, beyond: float) -> None:
    noise = np.random.default_rng(1).normal(0, 0.02, size=before.shape)
    after = before + noise
    after[:, :WINDOW] -= 0.5
    after[:, WINDOW:] += beyond
    [arm] = cascade.measure(_bench(before, [after]))["arms"]
    for text in cascade.TEXTS:
        found = arm["texts"][text]["reverse_kl"]
        assert found["inside"]["change"]["mean"] == pytest.approx(-0.5, abs=0.02)
        assert found["beyond"]["change"]["mean"] == pytest.approx(beyond, abs=0.02)
        assert found["beyond"]["change"]["problems"] == PROBLEMS // 2
        assert (found["beyond"]["change"]["high"] < -0.1) == (beyond < 0)
        assert found["inside"]["change"]["high"] < -0.45


def test_seeds_are_averaged_within_problems_and_listed(before: np.ndarray) -> None:
    [arm] = cascade.measure(_bench(before, [before - 0.3, before - 0.1]))["arms"]
    inside = arm["texts"]["student"]["log_ratio"]["inside"]
    assert inside["change"]["mean"] == pytest.approx(-0.2)
    assert inside["by_seed"] == pytest.approx([-0.3, -0.1])
    assert inside["change"]["problems"] == PROBLEMS


def test_problems_that_no_longer_reach_a_bin_leave_the_comparison(before: np.ndarray) -> None:
    after = before.copy()
    after[1, WINDOW:] = np.nan  # the hardest question of all, had it counted
    before = before.copy()
    before[1, WINDOW:] = 1000.0
    [arm] = cascade.measure(_bench(before, [after]))["arms"]
    beyond = arm["texts"]["own"]["reverse_kl"]["beyond"]
    assert beyond["change"]["mean"] == 0
    assert beyond["before"]["mean"] == beyond["after"]["mean"] < 100


def test_a_student_that_is_its_teacher_does_not_change(tmp_path: Path) -> None:
    table = path("abc") | {"c": FORK[0], "d": {"f": 1.0}, "e": {"f": 1.0}} | path("f")
    bench = open_bench(chain_config(tmp_path, table, table), tmp_path)
    [arm] = cascade.measure(bench)["arms"]
    for text in cascade.TEXTS:
        for quantity in cascade.QUANTITIES:
            for bin in arm["texts"][text][quantity]["change"]:
                assert abs(bin["mean"]) < 1e-4


def test_training_on_the_fork_lowers_it_and_leaves_the_student_as_it_was(tmp_path: Path) -> None:
    tables = [path("abc") | {"c": r, "d": {"f": 1.0}, "e": {"f": 1.0}} | path("f") for r in FORK]
    config = chain_config(tmp_path, *tables)
    config = with_overrides(config, {"optim.lr": 0.003, "rollout.prompts": 16, "steps": 30})
    bench = open_bench(config, tmp_path)
    weights = {k: v.clone() for k, v in bench.student.model.state_dict().items()}
    [arm] = cascade.measure(bench)["arms"]
    found = arm["texts"]["teacher"]["reverse_kl"]
    assert found["before"][2]["mean"] == pytest.approx(kl(*FORK), abs=1e-3)
    assert found["change"][2]["mean"] < -0.9 * kl(*FORK)
    for name, value in bench.student.model.state_dict().items():
        assert value.equal(weights[name]), name
