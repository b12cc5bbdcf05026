"""Values of tokens on chains, where each follows from the tables by hand."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from esr_train.config import Config
from esr_train.diagnose.bench import Bench
from esr_train.diagnose.progress import Progress
from tests.diagnose.chains import chain_config, kl, path

FORK = {"d": 0.8, "e": 0.2}, {"d": 0.1, "e": 0.9}


def open_bench(config: Config, root: Path) -> Bench:
    return Bench(config, root / "training", trains=True, progress=Progress(quiet=True))


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """a b c, then d or e with other probabilities, then f, and the end."""
    root = tmp_path_factory.mktemp("forked")
    tables = [
        path("abc") | {"c": row} | {"d": {"f": 1.0}, "e": {"f": 1.0}} | path("f") for row in FORK
    ]
    return open_bench(chain_config(root, *tables, problems=40), root)


def test_the_divergence_is_at_the_fork_and_nowhere_else(forked: Bench) -> None:
    texts, values = forked.student_answers, forked.on_student
    assert forked.text(texts.response(0)) in ("bcdf", "bcef")
    assert set(texts.lengths.tolist()) == {5}
    for found, expected in (
        (values.reverse_kl, kl(*FORK)),
        (values.forward_kl, kl(FORK[1], FORK[0])),
        (values.student_entropy, -sum(p * math.log(p) for p in FORK[0].values())),
        (values.teacher_entropy, -sum(p * math.log(p) for p in FORK[1].values())),
    ):
        assert np.allclose(found[:, 2], expected, atol=1e-4)
        assert np.abs(np.delete(found[:, :5], 2, axis=1)).max() < 1e-4
        assert np.isnan(found[:, 5:]).all()


def test_ranks_agreement_and_log_ratios_are_those_of_the_tables(forked: Bench) -> None:
    texts, values = forked.student_answers, forked.on_student
    is_d = np.array([forked.text(texts.response(row))[2] == "d" for row in range(40)])
    assert 0 < is_d.sum() < 40
    assert np.array_equal(values.token_rank[:, 2], np.where(is_d, 2, 1))
    assert (values.top_rank[:, 2] == 2).all() and (values.agreement[:, 2] == 0).all()
    assert (values.agreement[:, [0, 1, 3, 4]] == 1).all()
    assert (values.top_rank[:, [0, 1, 3, 4]] == 1).all()
    expected = np.where(is_d, abs(math.log(0.8 / 0.1)), abs(math.log(0.2 / 0.9)))
    assert np.allclose(values.log_ratio[:, 2], expected, atol=1e-4)


def test_a_student_equal_to_its_teacher_differs_nowhere(tmp_path: Path) -> None:
    table = path("abc") | {"c": FORK[0], "d": {"f": 1.0}, "e": {"f": 1.0}}
    bench = open_bench(chain_config(tmp_path, table, table), tmp_path)
    values = bench.on_student
    for name in ("reverse_kl", "forward_kl", "log_ratio"):
        assert np.nanmax(getattr(values, name)) < 1e-6
    assert np.nanmin(values.agreement) == 1
    assert bench.student_answers.tokens.equal(bench.teacher_answers.tokens)
    shapes = {getattr(values, field.name).shape for field in fields(values)}
    assert shapes == {tuple(bench.student_answers.tokens.shape)}
