"""Teacher decay, on teachers that decay by design and at a known place."""

from __future__ import annotations

from pathlib import Path

import pytest

from esr_train.diagnose import teacher_decay
from tests.diagnose.chains import chain_config, path
from tests.diagnose.test_measure import open_bench

# The student turns to "x" after two tokens, and never has a "g"; the teacher always has one.
STUDENT = path("abc") | {"c": {"x": 1.0}} | path("xyzwvu")
TEACHER = path("abcdefghijk")


@pytest.fixture(scope="module")
def decays(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A teacher that goes on with "xyz..." as the student does, once that is begun."""
    root = tmp_path_factory.mktemp("decays")
    return teacher_decay.measure(
        open_bench(chain_config(root, STUDENT, TEACHER | path("xyzwvu")), root)
    )


def _accuracies(result: dict, condition: str) -> list[float]:
    return [point["accuracy"][condition]["mean"] for point in result["points"]]


def test_a_teacher_decays_from_the_token_at_which_the_student_is_lost(decays: dict) -> None:
    assert [point["k"] for point in decays["points"]] == [0, 1, 2, 4]
    assert _accuracies(decays, "teacher_after_student") == [1, 1, 1, 0]
    assert [p["change"]["teacher_after_student"]["mean"] for p in decays["points"][1:]] == [
        0,
        0,
        -1,
    ]
    assert [p["cost_of_student_text"]["mean"] for p in decays["points"][1:]] == [0, 0, 1]


def test_the_controls_do_not_decay(decays: dict) -> None:
    assert _accuracies(decays, "teacher_after_teacher") == [1, 1, 1, 1]
    assert _accuracies(decays, "student_after_student") == [0, 0, 0, 0]


def test_a_teacher_that_mends_any_beginning_does_not_decay(tmp_path: Path) -> None:
    mends = TEACHER | {character: {"g": 1.0} for character in "xyzwvu"}
    result = teacher_decay.measure(open_bench(chain_config(tmp_path, STUDENT, mends), tmp_path))
    assert _accuracies(result, "teacher_after_student") == [1, 1, 1, 1]
    assert {p["cost_of_student_text"]["mean"] for p in result["points"][1:]} == {0}


def test_a_finished_answer_stays_and_does_not_count_as_open(tmp_path: Path) -> None:
    short = path("abx")  # "bx" and the end: three tokens
    result = teacher_decay.measure(open_bench(chain_config(tmp_path, short, TEACHER), tmp_path))
    assert [point["open"] for point in result["points"]] == [1, 1, 1, 0]
    assert _accuracies(result, "teacher_after_student")[-1] == 0
    last = result["points"][-1]
    assert last["change"]["teacher_after_student"] == {
        "mean": None,
        "low": None,
        "high": None,
        "problems": 0,
    }


def test_equal_models_go_on_equally_at_every_length(tmp_path: Path) -> None:
    either = path("abc") | {"c": {"g": 0.5, "x": 0.5}, "g": {"h": 1.0}, "x": {"h": 1.0}}
    config = chain_config(tmp_path, either, either, problems=20)
    result = teacher_decay.measure(open_bench(config, tmp_path))
    for point in result["points"]:
        after = [point["accuracy"][name] for name in teacher_decay.CONDITIONS]
        assert after[0] == after[1] == after[2]
    assert 0 < result["points"][0]["accuracy"]["teacher_after_student"]["mean"] < 1


def test_a_task_without_answers_is_said_to_have_no_accuracy(tmp_path: Path) -> None:
    config = chain_config(tmp_path, STUDENT, TEACHER)
    data = config.data.model_copy(update={"answer": None, "grader": None})
    result = teacher_decay.measure(open_bench(config.model_copy(update={"data": data}), tmp_path))
    assert result["points"] == []
    assert "no answers" in teacher_decay.show(result, tmp_path).findings[0]
