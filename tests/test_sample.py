from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esr_train.cli import main
from esr_train.config import Config, to_yaml
from tests.tiny import char_tokenizer, tiny_llama

MakeConfig = Callable[..., Config]


@pytest.fixture
def path(make_config: MakeConfig, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(make_config()))
    return path


def ask(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["sample", str(path), *options]) == 0
    return capsys.readouterr().out


def test_prompts_are_answered_with_log_probs(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = ask(path, capsys, "--prompt", "1+2", "--prompt", "33", "--samples", "3")
    assert printed.count("prompt (3 tokens): '1+2'") == 1
    assert printed.count("prompt (2 tokens): '33'") == 1
    heads = re.findall(
        r"sample (\d): (\d+) tokens?, (ended by EOS|cut), log-prob (-\d+\.\d+) \((-\d+\.\d+) a tok",
        printed,
    )
    assert [int(number) for number, *_ in heads] == [1, 2, 3, 1, 2, 3]
    blocks = re.split(r"sample \d: ", printed)[1:]
    for (_, count, end, total, mean), block in zip(heads, blocks, strict=True):
        assert (end == "cut") == ("'<eos>'" not in block) and int(count) <= 6
        each = [float(x) for x in re.findall(r"'(?:.?|<\w+>)' (-?\d+\.\d\d)(?:  |\n|$)", block)]
        assert len(each) == int(count)
        assert sum(each) == pytest.approx(float(total), abs=0.005 * len(each) + 1e-3)
        assert float(total) / len(each) == pytest.approx(float(mean), abs=1e-3)
    assert (
        ask(path, capsys, "--prompt", "1+2", "--samples", "3")
        == printed.split("\n\nprompt")[0] + "\n"
    )
    other = ask(path, capsys, "--prompt", "1+2", "--samples", "3", "--seed", "1")
    assert other != ask(path, capsys, "--prompt", "1+2", "--samples", "3")


def test_greedy_is_what_transformers_generates(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompt", "1+2", "--temperature", "0", "--max-new-tokens", "9")
    student = ask(path, capsys, *options, "--samples", "1")
    ids = torch.tensor([char_tokenizer()("1+2")["input_ids"]])
    mask = torch.ones_like(ids)
    out = tiny_llama(0).generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    text = char_tokenizer().decode(out[0, 3:], skip_special_tokens=True)
    assert f"\n  {text!r}\n" in student
    assert ask(path, capsys, *options, "--samples", "1", "--teacher") != student


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "1" * 200], "the longest prompt has 200 tokens"),
        (["--prompt", "1", "--max-new-tokens", "500"], "with 500 new ones exceeds"),
        (["--prompt", "1", "student.model=/nowhere"], "no such directory"),
        (["--prompt", "1", "data.tsk=sums"], "did you mean 'data.task'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(path), *arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("esr-train: error: ") and message in printed
    assert "\n" not in printed


@pytest.mark.parametrize(
    "filters", [("--top-k", "1"), ("--top-p", "1e-6"), ("--min-p", "1")], ids=lambda f: f[0]
)
def test_the_narrowest_filters_leave_the_greedy_answer(
    path: Path, capsys: pytest.CaptureFixture[str], filters: tuple[str, str]
) -> None:
    """With the log-probs of the whole distribution, all the same."""
    options = ("--prompt", "1+2", "--samples", "1", "--max-new-tokens", "9")
    greedy = ask(path, capsys, *options, "--temperature", "0")
    assert ask(path, capsys, *options, "--temperature", "1", *filters) == greedy
    assert ask(path, capsys, *options, "--temperature", "1") != greedy


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prompt", "1", "--samples", "0"],
        ["--prompt", "1", "--temperature", "-1"],
        ["--prompt", "1", "--top-p", "1.5"],
        ["--prompt", "1", "--top-k", "2.5"],
    ],
    ids=["no prompt", "no samples", "temperature", "top-p", "top-k"],
)
def test_usage_errors_are_exit_code_2(path: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(path), *options])
    assert caught.value.code == 2
