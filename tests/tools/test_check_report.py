"""Reports in a headless browser, and pages with a fault of each kind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from esr_train.report import write_report
from tests.report.runs import realistic
from tools.check_report import NoBrowserError, browser, problems

try:
    browser()
    MISSING = None
except NoBrowserError as error:
    MISSING = str(error)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    realistic(folder, seeds=2)
    return write_report(folder)


def test_every_figure_of_a_report_is_drawn_without_errors_or_network(page: Path) -> None:
    images, found = problems(page)
    assert found == []
    assert images == len(list((page.parent / "figures").glob("*.png"))) > 5


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (lambda text: re.sub("base64,iVBOR", "base64,AAAA", text, count=1), "not drawn"),
        (lambda text: text.replace("</body>", "<script>nothing()</script></body>"), "nothing"),
        (lambda text: text.replace("</body>", "<script>console.error(7)</script></body>"), "7"),
        (
            lambda text: text.replace("</body>", '<img src="https://example.com/a.png"></body>'),
            "asked for https://example.com",
        ),
        (
            lambda text: text.replace("</head>", '<link rel=stylesheet href="http://b.c"></head>'),
            "asked for http://b.c",
        ),
        (lambda text: text.replace("<img ", '<img style="display:none" ', 1), "not drawn"),
    ],
)
def test_a_fault_is_found(page: Path, tmp_path: Path, broken, expected: str) -> None:
    text = page.read_text(encoding="utf-8")
    assert (faulty := broken(text if "</body>" in text else text + "</body>")) != text
    (tmp_path / "page.html").write_text(faulty, encoding="utf-8")
    _, found = problems(tmp_path / "page.html")
    assert any(expected in item for item in found), found
