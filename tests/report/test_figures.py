"""The figures of a report: how seeds are merged, and how large a picture is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esr_train.report.axes import band
from esr_train.report.figures import draw_pictures
from esr_train.report.summary import summarise
from tests.report.runs import by_hand


def test_wide_figures_have_two_pixels_a_css_pixel(tmp_path: Path) -> None:
    run = by_hand(tmp_path)
    pictures = draw_pictures(run, summarise(run), tmp_path / "figures")
    for picture in pictures:
        width = int.from_bytes(picture.path.read_bytes()[16:20], "big")
        assert width == (1600 if picture.wide else 800)


def test_band_interpolates_on_the_union_of_points_and_holds_finished_seeds() -> None:
    short = (np.array([0.0, 2.0]), np.array([0.0, 1.0]))
    long = (np.array([0.0, 4.0]), np.array([0.0, 0.4]))
    grid, middle, low, high = band([short, long], [True, True])
    assert grid.tolist() == [0, 2, 4]
    assert middle.tolist() == pytest.approx([0, 0.6, 0.7])  # at 2: (1 + 0.2)/2; at 4: (1 + 0.4)/2
    assert (low.tolist(), high.tolist()) == (pytest.approx([0, 0.2, 0.4]), [0, 1, 1])
    assert band([short, long], [False, True])[1].tolist() == pytest.approx([0, 0.6, 0.4])
