from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from esr_train import cli
from esr_train.cli import main
from esr_train.config import load_config, to_yaml
from esr_train.metrics import read_rows
from tests.tiny import MakeConfig


@pytest.fixture
def path(make_config: MakeConfig, tmp_path: Path) -> Path:
    arms = [{"name": "esr-3", "max_new_tokens": 3}, {"name": "full", "max_new_tokens": 6}]
    path = tmp_path / "tiny.yaml"
    path.write_text(to_yaml(make_config(arms=arms)))
    return path


Capture = pytest.CaptureFixture[str]


def test_train_report_and_evaluate(path: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "run"
    assert main(["train", str(path), "steps=2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "first prompt, to the student:" in printed.out + printed.err
    assert "first prompt, to the teacher:" in printed.out + printed.err
    *_, model_line, report_line = printed.out.splitlines()
    assert Path(report_line) == out / "report.html" and (out / "report.html").is_file()

    model = model_line.removeprefix("model: ")
    assert main(["evaluate", str(path), "--model", model]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    last = read_rows(out / "arms" / "train" / "seed0" / "evals.jsonl")[-1]
    assert metrics == pytest.approx(last["metrics"])

    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == report_line

    # The same command goes on from where it was; another configuration is refused.
    assert main(["train", str(path), "--out", str(out), "steps=3"]) == 0
    assert len(read_rows(out / "arms" / "train" / "seed0" / "metrics.jsonl")) == 3
    assert main(["train", str(path), "--out", str(out), "optim.lr=0.5"]) == 2
    assert "another configuration: optim.lr was" in capsys.readouterr().err


def test_compare_ends_with_the_path_of_the_report(
    path: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "run"
    assert main(["compare", str(path), "--out", str(out), "--steps", "1", "optim.lr=0.001"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    assert load_config(out / "config.yaml").optim.lr == 0.001


@pytest.mark.parametrize("command", ["train", "compare", "evaluate"])
def test_a_dry_run_prints_the_config_and_estimates_and_stops(
    path: Path,
    command: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "load_experiment", None)
    cap = ["--steps", "7"] if command == "compare" else ["steps=7"]
    assert main([command, str(path), "steps=9", *cap, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7" in printed
    if command == "compare":
        assert "full: 7 steps; a step samples at most 48 tokens (8 responses x 6)" in printed
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml is not a file"),
        (["train", "CONFIG", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["compare", "CONFIG", "loss.divergence=revers_kl"], "loss.divergence: "),
        (["compare", "CONFIG", "student.model=/nowhere"], "no such directory"),
        (["compare", "CONFIG", "data.task=sumz"], "data.task: "),
        (["compare", "CONFIG", "data.task=prompts", "eval.problems=9999"], "eval.problems: "),
        (["train", "CONFIG", "--dry-run", "--out", "CONFIG"], "is not a directory"),
        (["compare", "CONFIG", "arms=[]"], "compare needs a list"),
        (["compare", "CONFIG", "arms=[]", "--dry-run"], "compare needs a list"),
        (["compare", "CONFIG", "eval.max_new_tokens=400"], "context overflow"),
        (["evaluate", "CONFIG", "--model", "builtin:nothing"], "no such built-in model"),
        (["report", "nowhere"], "nowhere"),
        (["sample", "CONFIG", "--prompt", "1" * 200], "the longest prompt has 200 tokens"),
        (["sample", "CONFIG", "--prompt", "1", "--max-new-tokens", "500"], "with 500 new ones exc"),
        (["sample", "CONFIG", "--prompt", "1", "student.model=/nowhere"], "no such directory"),
        (["sample", "CONFIG", "--prompt", "1", "data.tsk=sums"], "did you mean 'data.task'"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    path: Path, arguments: list[str], message: str, capsys: Capture
) -> None:
    arguments = [str(path) if a == "CONFIG" else a for a in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("esr-train: error: ") and message in printed
    assert "\n" not in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian", "invalid choice: 'trian'"),
        ("train a --oot", "unrecognized arguments: --oot"),
        ("fetch gpt", "invalid choice: 'gpt'"),
        *((f"compare a --jobs {n}", f"got {n}, must be a whole") for n in "0 -1 two 1.5".split()),
        ("sample a", "required: --prompt"),
        ("sample a --prompt 1 --samples 0", "--samples"),
        ("sample a --prompt 1 --temperature -1", "--temperature"),
        ("sample a --prompt 1 --top-p 1.5", "--top-p"),
        ("sample a --prompt 1 --top-k 2.5", "--top-k"),
    ],
)
def test_usage_errors_are_exit_code_2(arguments: str, message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(
    path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(cli, "load_experiment", full)
    assert main(["evaluate", str(path)]) == 2
    assert "CUDA out of memory. Set optim.max_tokens" in capsys.readouterr().err
