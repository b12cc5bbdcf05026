"""The predictions of bench/scaling.py: against sums done by hand, and the committed page."""

from __future__ import annotations

import json
import re

import pytest

from bench import scaling


@pytest.fixture(scope="module")
def small() -> dict[tuple[int, str], scaling.Row]:
    pair = scaling.PAIRS[0]
    models = tuple(scaling.on_meta(name) for name in pair)
    return {
        (gpus, arm): scaling.predict(pair, models, gpus, arm)
        for gpus, arm in ((1, "ESR"), (64, "ESR"))
    }


def test_shards_and_links_are_as_the_page_says(small: dict[tuple[int, str], scaling.Row]) -> None:
    student, teacher = 494_032_768, 1_543_714_304  # parameters of the published models
    one, many = small[1, "ESR"], small[64, "ESR"]
    assert one.resident == 2 * (student + teacher) + 16 * student
    assert one.received == one.exposed == 0
    # Both models fit on a GPU: 64 replicas, whose gradients are summed once.
    assert many.shards == 1
    assert many.received == pytest.approx(2 * 63 / 64 * 4 * student)
    assert many.exposed == pytest.approx(many.received / (0.7 * 50e9))
    # The launches of decoding are not divided among GPUs.
    assert many.seconds < one.seconds / 5
    # Six fp32 arrays of the largest pass: 46 responses x 100 tokens.
    assert one.logits == 6 * 4 * 46 * 100 * 151_936


def test_the_committed_page_holds_the_rows_of_the_record(
    small: dict[tuple[int, str], scaling.Row],
) -> None:
    record = json.loads((scaling.ROOT / "bench/results/scaling.json").read_text())
    rows = [scaling.Row(**row) for row in record]
    assert len(rows) == len(scaling.PAIRS) * len(scaling.GPUS) * len(scaling.LENGTHS)
    page = (scaling.ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert scaling.filled(page, rows) == page
    found = next(row for row in rows if row.gpus == 64)
    assert found == small[64, "ESR"]
    assert not any(row.fits for row in rows if row.student == "Llama-3.3-70B")


def test_a_page_without_its_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("must have one block 'steps', found 0")):
        scaling.filled("", [])


def test_what_the_page_says_in_words_is_what_the_record_has() -> None:
    record = json.loads((scaling.ROOT / "bench/results/scaling.json").read_text())
    rows = {(row.student, row.gpus, row.arm): row for row in (scaling.Row(**x) for x in record)}
    fits = [key for key, row in rows.items() if row.fits and key[2] == "ESR"]
    shorter = {
        key[:2]: rows[(*key[:2], "full")].seconds / rows[key].seconds
        for key in fits
        if rows[(*key[:2], "full")].fits
    }
    assert sorted(round(x) for (_, gpus), x in shorter.items() if gpus == 1) == [11, 18]
    many = [round(x) for (_, gpus), x in shorter.items() if gpus == 64]
    assert (min(many), max(many)) == (12, 15)
    shares = [rows[key].exposed / rows[key].seconds for key in fits if key[1] == 64]
    assert 0.08 < min(shares) < 0.11 and 0.3 < max(shares) < 0.35  # a tenth to a third
    shares = [round(100 * rows[pair[0], 1, "full"].loss_share) for pair in scaling.PAIRS[:2]]
    assert shares == [10, 4]
    larger = [row for (student, _, _), row in rows.items() if "8B" in student and row.fits]
    assert all(0.003 < row.loss_share < 0.025 for row in larger)  # at most 2 % from 8B on
    for (student, gpus, arm), row in rows.items():
        if gpus == 8 and arm == "full" and student != scaling.PAIRS[0][0]:
            assert row.peak - row.loss_bytes + row.logits > 80e9, "whole logits would fit"
