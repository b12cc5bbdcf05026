"""What signals select, where it is known."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from esr_train.diagnose import signals
from esr_train.diagnose.measure import TokenValues

ROWS, LENGTH, N = 40, 20, 5


def _values(**given: np.ndarray) -> TokenValues:
    rest = {field.name: np.ones((ROWS, LENGTH)) for field in fields(TokenValues)}
    return TokenValues(**rest | given)


def _falling() -> np.ndarray:
    return np.broadcast_to(np.linspace(2.0, 1.0, LENGTH), (ROWS, LENGTH)).copy()


def test_a_signal_that_falls_selects_the_first_and_one_that_rises_the_last() -> None:
    found = signals.of_window(
        _values(student_entropy=_falling(), teacher_entropy=_falling()[:, ::-1]), N, 1
    )["signals"]
    assert found["H(student)"]["overlap"]["mean"] == 1
    assert found["H(student)"]["mean_position"]["mean"] == 3
    assert found["H(teacher)"]["overlap"]["mean"] == 0
    assert found["H(teacher)"]["mean_position"]["mean"] == LENGTH - 2


def test_a_constant_signal_is_chance() -> None:
    found = signals.of_window(_values(), N, 1)
    assert found["chance"]["mean"] == N / LENGTH
    for name in ("KL", "random", "H(student) H(teacher)"):
        x = found["signals"][name]
        assert x["overlap"]["mean"] == pytest.approx(N / LENGTH, abs=0.1)
        assert x["above_chance"]["low"] <= 0 <= x["above_chance"]["high"]
        assert x["kl_share"]["mean"] == pytest.approx(N / LENGTH)


def test_products_rank_by_the_product() -> None:
    spike = np.ones((ROWS, LENGTH))
    spike[:, 10:15] = 9.0
    found = signals.of_window(_values(reverse_kl=_falling(), student_entropy=spike), N, 1)
    assert found["signals"]["KL H(student)"]["mean_position"]["mean"] == 13
    assert found["signals"]["KL"]["overlap"]["mean"] == 1


def test_a_window_without_divergence_has_no_share_of_it() -> None:
    kl = np.zeros((ROWS, LENGTH))
    kl[:, N : 2 * N] = 1.0
    found = signals.of_window(_values(reverse_kl=kl), N, 1)
    assert found["first_kl_share"]["mean"] == 0
    assert found["signals"]["KL"]["kl_share"]["mean"] == 1
    assert found["signals"]["KL"]["overlap"]["mean"] == 0


def test_answers_that_are_no_longer_than_the_window_are_left_out() -> None:
    kl = _falling()
    kl[: ROWS // 2, N:] = np.nan  # of these, anything would select the first
    rising = kl[:, ::-1].copy()
    rising[: ROWS // 2] = kl[: ROWS // 2]
    found = signals.of_window(_values(reverse_kl=rising), N, 1)
    assert found["answers"] == ROWS // 2
    assert found["signals"]["KL"]["overlap"]["mean"] == 0


def test_no_token_beyond_the_end_is_selected() -> None:
    signal = np.array([[1.0, np.nan, np.nan], [1.0, 3.0, 2.0]])
    assert signals.select(signal, 2).tolist() == [[True, False, False], [False, True, True]]
