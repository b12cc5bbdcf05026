"""README and docs: generated blocks are current, snippets run, commands and links exist."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

import esr_kernels
from bench import readme
from esr_train.cli import main
from esr_train.config import load_config
from tests.tiny import tiny_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]


def _blocks(language: str) -> list[str]:
    return re.findall(f"```{language}\n(.*?)```", README, re.DOTALL)


def _commands(program: str) -> list[list[str]]:
    lines = "\n".join(_blocks("bash")).splitlines()
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith(program + " ")
    ]


@pytest.mark.parametrize("page", readme.pages())
def test_generated_blocks_are_those_of_the_committed_records(page: str) -> None:
    assert readme.filled(page) == (ROOT / page).read_text(encoding="utf-8"), (
        "run python -m bench.readme"
    )


def test_readme_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) < 250


def test_snippets_of_readme_run() -> None:
    names: dict = {}
    snippets = _blocks("python")
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    student, teacher = tiny_llama(0), tiny_llama(1, hidden_size=48)
    ids = torch.randint(2, 30, (3, 9))
    response = torch.arange(9).expand(3, 9) >= 4
    loss = names["distillation_loss"](student, teacher, ids, torch.ones_like(ids), response)
    loss.backward()
    assert loss.item() > 0 and student.lm_head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_make_targets_of_readme_exist() -> None:
    named = {command[0] for command in _commands("make")} | set(
        re.findall(r"`make ([\w-]+)`", README)
    )
    exist = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "docs"} <= named <= set(exist)


def test_commands_of_readme_are_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every configuration exists and takes the overrides, and every option is known."""
    commands = _commands("esr-train")
    assert len(commands) > 5
    for command in commands:
        files = [part for part in command if part.endswith(".yaml")]
        overrides = [part for part in command if re.match(r"[\w.]+=", part)]
        for path in files:
            load_config(ROOT / path, overrides)
        with pytest.raises(SystemExit) as stopped:  # its help names the options that it has
            main([*command, "--help"])
        assert stopped.value.code == 0, command
        options = {part for part in command if part.startswith("--")}
        known = capsys.readouterr().out
        assert all(option in known for option in options), (command, known)


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (ROOT / page).parent.joinpath(target).exists()]
    assert missing == []


def test_the_site_has_all_public_names_and_all_pages() -> None:
    api = (ROOT / "docs/api/esr_kernels.md").read_text()
    assert sorted(re.findall(r"^::: esr_kernels\.(\w+)$", api, re.MULTILINE)) == sorted(
        esr_kernels.__all__
    )
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    missing = {page for page in pages if page not in nav}
    assert missing == set(), "add them to the nav of mkdocs.yml"


@pytest.mark.parametrize("name", esr_kernels.__all__)
def test_the_errors_of_a_docstring_are_named_as_the_site_reads_them(name: str) -> None:
    """`ValueError, TypeError: when`; a line of another form would be left out of the page."""
    lines = inspect.getdoc(getattr(esr_kernels, name)).splitlines()  # type: ignore[union-attr]
    if "Raises:" not in lines:
        return
    first = lines[lines.index("Raises:") + 1 :]
    section = first[: first.index("") if "" in first else None]
    entries = [line for line in section if re.match(r" {4}\S", line)]
    assert entries and all(re.match(r" {4}\w+Error(, \w+Error)*: ", line) for line in entries)
