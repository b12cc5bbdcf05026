from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from esr_train.cli import main
from esr_train.config import to_yaml
from tests.tiny import MakeConfig, by_transformers, char_tokenizer, tiny_llama

Ask = Callable[..., str]


@pytest.fixture
def ask(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What `esr-train sample` prints."""
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(make_config()))

    def run(*options: str) -> str:
        assert main(["sample", str(path), *options]) == 0
        return capsys.readouterr().out

    return run


def test_prompts_are_answered_with_log_probs(ask: Ask) -> None:
    printed = ask("--prompt", "1+2", "--prompt", "33", "--samples", "3")
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
    again = ask("--prompt", "1+2", "--samples", "3")
    assert again == printed.split("\n\nprompt")[0] + "\n"
    assert again != ask("--prompt", "1+2", "--samples", "3", "--seed", "1")


def test_greedy_is_what_transformers_generates(ask: Ask) -> None:
    options = ("--prompt", "1+2", "--temperature", "0", "--max-new-tokens", "9")
    student = ask(*options, "--samples", "1")
    tokens = by_transformers(tiny_llama(0), char_tokenizer()("1+2")["input_ids"], 9)
    text = char_tokenizer().decode(tokens, skip_special_tokens=True)
    assert f"\n  {text!r}\n" in student
    assert ask(*options, "--samples", "1", "--teacher") != student


@pytest.mark.parametrize(
    "filters", [("--top-k", "1"), ("--top-p", "1e-6"), ("--min-p", "1")], ids=lambda f: f[0]
)
def test_the_narrowest_filters_leave_the_greedy_answer(ask: Ask, filters: tuple[str, str]) -> None:
    """With the log-probs of the whole distribution, all the same."""
    options = ("--prompt", "1+2", "--samples", "1", "--max-new-tokens", "9")
    greedy = ask(*options, "--temperature", "0")
    assert ask(*options, "--temperature", "1", *filters) == greedy
    assert ask(*options, "--temperature", "1") != greedy


def test_a_teacher_on_a_server_is_not_sampled_here(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(make_config()))
    options = ["sample", str(path), "--prompt", "1", "--teacher", "teacher.url=http://localhost:1"]
    options += ["loss.divergence=reverse_kl", "eval.teacher_text=0", "eval.student_text=0"]
    assert main(options) == 2
    assert "teacher.url: got 'http://localhost:1', must be null" in capsys.readouterr().err
