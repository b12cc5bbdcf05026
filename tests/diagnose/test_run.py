"""Whole diagnoses: the report and its figures, going on after a stop, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from esr_train import cli
from esr_train.config import Config, ConfigError, to_yaml, with_overrides
from esr_train.diagnose import describe_diagnosis, diagnose
from esr_train.diagnose.bench import windows
from esr_train.diagnose.run import SECTIONS
from tests.diagnose.chains import chain_config, page_problems, path
from tests.diagnose.test_measure import FORK

FIGURES = {
    "teacher_decay",
    "where_by_position",
    "where_first",
    "cascade_0_reverse_kl",
    "cascade_0_log_ratio",
    "commitment_openings",
    "commitment_lengths",
    "signals_overlap",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    tables = [path("abc") | {"c": r, "d": {"f": 1.0}, "e": {"f": 1.0}} | path("f") for r in FORK]
    return chain_config(tmp_path_factory.mktemp("run"), *tables)


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diagnosis, given as a command."""
    root = tmp_path_factory.mktemp("finished")
    (root / "chains.yaml").write_text(to_yaml(config))
    out = root / "out"
    assert cli.main(["diagnose", str(root / "chains.yaml"), "--out", str(out)]) == 0
    return out


def test_every_figure_is_in_the_report_and_nothing_is_of_a_network(finished: Path) -> None:
    page = finished / "report.html"
    assert page_problems(page) == []
    text = page.read_text(encoding="utf-8")
    drawn = {figure.stem for figure in (finished / "figures").glob("*.png")}
    assert drawn == FIGURES
    assert text.count('src="data:image/png;base64,') == text.count("<img ") == len(FIGURES)
    markdown = (finished / "report.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((.*?)\)", markdown)
    assert {Path(link).stem for link in links} == FIGURES
    assert all((finished / link).is_file() for link in links)
    for section in SECTIONS:
        assert section.title in text and section.title in markdown
    assert not re.search(
        r"\b(nan|None|inf)\b", re.sub(r"base64,[^\"]+", "", text).split("How to")[0]
    )


def test_the_check_of_a_page_finds_what_it_is_for(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<img alt="" src="a.png"><script>1</script><img src="https://x.org/b.png">')
    assert len(page_problems(page)) == 4


def test_every_section_has_its_numbers_and_what_they_rest_on(finished: Path) -> None:
    for section in SECTIONS:
        path = finished / "sections" / f"{section.name}.json"
        result = json.loads(path.read_text(), parse_constant=pytest.fail)
        assert result["facts"]["problems"] == 10
        assert result["facts"]["training_seeds"] == [0]


def test_finished_sections_and_trained_students_are_used_again(
    config: Config, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = {path.name: path.read_text() for path in (out / "sections").iterdir()}
    marked = json.loads(before["where.json"]) | {"mark": 1}
    (out / "sections" / "where.json").write_text(json.dumps(marked))
    (out / "sections" / "cascade.json").unlink()
    metrics = out / "training" / "arms" / "train" / "seed0" / "metrics.jsonl"
    trained = metrics.stat().st_mtime_ns
    diagnose(config, out, quiet=True)
    assert json.loads((out / "sections" / "where.json").read_text())["mark"] == 1
    assert metrics.stat().st_mtime_ns == trained
    again, was = (
        json.loads(text)
        for text in ((out / "sections" / "cascade.json").read_text(), before["cascade.json"])
    )
    assert {k: v for k, v in again.items() if k != "facts"} == {
        k: v for k, v in was.items() if k != "facts"
    }


def test_another_configuration_is_refused_and_changes_nothing(
    config: Config, finished: Path
) -> None:
    other = with_overrides(config, {"diagnose.problems": 7})
    page = (finished / "report.html").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="diagnose.problems was 10, is 7"):
        diagnose(other, finished, quiet=True)
    assert (finished / "report.html").stat().st_mtime_ns == page


def test_a_directory_with_something_else_is_refused(
    config: Config, finished: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="holds a run, not a diagnosis"):
        diagnose(config, finished / "training", quiet=True)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        diagnose(config, tmp_path, quiet=True)


def test_the_models_of_a_run_are_taken_as_they_are(
    config: Config, finished: Path, tmp_path: Path
) -> None:
    taken = with_overrides(config, {"diagnose.run": str(finished / "training")})
    out = tmp_path / "out"
    diagnose(taken, out, quiet=True)
    assert not (out / "training").exists()
    results = [json.loads((x / "sections" / "cascade.json").read_text()) for x in (out, finished)]
    assert results[0]["arms"] == results[1]["arms"]
    other = with_overrides(taken, {"diagnose.run": str(tmp_path / "none")})
    for refuses in (lambda: diagnose(other, tmp_path / "more"), lambda: describe_diagnosis(other)):
        with pytest.raises(ConfigError, match="diagnose.run: got .*none', must be the directory"):
            refuses()


def test_keys_that_cannot_be_used_are_named(config: Config) -> None:
    with pytest.raises(ConfigError, match="diagnose.arms: got 'esr'"):
        describe_diagnosis(with_overrides(config, {"diagnose.arms": ["esr"]}))
    with pytest.raises(ConfigError, match="diagnose.prefixes"):
        with_overrides(config, {"diagnose.prefixes": [4, 2]})


def test_a_dry_run_counts_what_is_sampled(config: Config) -> None:
    text = describe_diagnosis(config)
    # 10 answers of 12: by 2 models twice, by 1 trained student, and 3 after 1, 2 and 4 tokens
    assert f"at most {10 * (12 * 5 + 3 * (11 + 10 + 8)):,} tokens sampled" in text
    assert "windows of 3 first tokens" in text and "train, seeds 0" in text


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ([{"name": "short", "max_new_tokens": 2}, {"name": "full"}], [2]),
        ([{"name": "masked", "loss.window_tokens": 3}, {"name": "full"}], [3]),
        ([{"name": "a", "max_new_tokens": 2}, {"name": "b", "loss.window_tokens": 3}], [2, 3]),
        ([{"name": "both", "max_new_tokens": 2, "loss.window_tokens": 3}], [2]),
        ([{"name": "full"}], [1]),  # a quarter of an answer
    ],
)
def test_windows_are_the_tokens_that_arms_train_on(
    config: Config, arms: list[dict], expected: list[int]
) -> None:
    changes = {"rollout.max_new_tokens": 6, "eval.max_new_tokens": 6, "arms": arms}
    assert windows(with_overrides(config, {**changes, "report.baseline": None})) == expected
