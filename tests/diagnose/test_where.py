"""Where the divergence is: forks and stops whose place and cost are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from esr_train.diagnose import where
from tests.diagnose.chains import chain_config, kl, path
from tests.diagnose.test_measure import FORK, open_bench


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A fork at the third token of five and none elsewhere; the same terminator."""
    root = tmp_path_factory.mktemp("where")
    tables = [path("abc") | {"c": r, "d": {"f": 1.0}, "e": {"f": 1.0}} | path("f") for r in FORK]
    return where.measure(open_bench(chain_config(root, *tables), root))


def test_the_bin_of_the_fork_has_its_divergence_and_the_others_none(forked: dict) -> None:
    assert forked["edges"] == [0, 1, 2, 3, 4, 5]
    means = [bin["mean"] for bin in forked["by_position"]["reverse_kl"]]
    assert means == pytest.approx([0, 0, kl(*FORK), 0, 0], abs=1e-4)
    means = [bin["mean"] for bin in forked["by_position"]["forward_kl"]]
    assert means == pytest.approx([0, 0, kl(FORK[1], FORK[0]), 0, 0], abs=1e-4)
    assert [bin["mean"] for bin in forked["by_position"]["agreement"]] == [1, 1, 0, 1, 1]


def test_the_share_of_the_first_tokens_jumps_at_the_fork(forked: dict) -> None:
    shares = {row["n"]: row["share"]["mean"] for row in forked["first"]}
    assert [shares[n] for n in (1, 2, 3, 4, 5)] == pytest.approx([0, 0, 1, 1, 1], abs=1e-4)
    tokens = {row["n"]: row["share_of_tokens"]["mean"] for row in forked["first"]}
    assert [tokens[n] for n in (1, 2, 3, 4, 5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_common_terminator_costs_nothing_and_is_not_merged(forked: dict) -> None:
    assert list(forked["stops"]) == ["apart"]
    found = forked["stops"]["apart"]
    assert found["count"] == 10 and found["stopped"]["mean"] == 1
    assert found["cost"]["mean"] == pytest.approx(0, abs=1e-4)


def test_equal_models_have_no_divergence_and_no_share_of_it(tmp_path: Path) -> None:
    table = path("abc") | {"c": FORK[0], "d": {"f": 1.0}, "e": {"f": 1.0}} | path("f")
    result = where.measure(open_bench(chain_config(tmp_path, table, table), tmp_path))
    for quantity in ("reverse_kl", "forward_kl", "log_ratio"):
        assert max(abs(x["mean"]) for x in result["by_position"][quantity]) < 1e-6
    assert where.show(result, tmp_path).findings


def test_a_stop_that_the_teacher_spells_otherwise_costs_its_log_prob_unless_merged(
    tmp_path: Path,
) -> None:
    """The student ends by <eos>, the teacher by "z", where it does not write "y"."""
    student = path("abcd")
    teacher = path("abcd") | {"d": {".": 0.9, "y": 0.1}}
    config = chain_config(tmp_path, student, teacher, end="z")
    stops = where.measure(open_bench(config, tmp_path))["stops"]
    apart, merged = stops["apart"], stops["merged"]
    assert apart["count"] == merged["count"] == 10
    assert apart["teacher_logprob"]["mean"] < -25  # _NEVER
    assert apart["cost"]["mean"] == pytest.approx(-apart["teacher_logprob"]["mean"], abs=0.1)
    assert apart["share_of_answer"]["mean"] == pytest.approx(1, abs=1e-3)
    assert merged["cost"]["mean"] == pytest.approx(math.log(1.0 / 0.9), abs=1e-3)
    assert merged["reverse_kl"]["mean"] == pytest.approx(math.log(1.0 / 0.9), abs=1e-3)


def test_shares_are_means_over_problems_of_each_answers_own_share() -> None:
    kl_of = np.array([[3.0, 1.0, 0.0], [1.0, 3.0, np.nan], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = where.shares_of_first(kl_of, 1, samples=2)
    assert (found["share"]["mean"], found["share"]["problems"]) == (0.5, 1)
    assert found["share_of_tokens"]["mean"] == pytest.approx((5 / 12 + 1 / 3) / 2)
