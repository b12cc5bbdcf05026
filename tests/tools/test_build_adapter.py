"""The task and the adapter of configs/tally.yaml, and the script that trains it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esr_train.adapters import CONFIG, WEIGHTS, AdapterError, load_adapter
from esr_train.cli import main
from esr_train.config import load_config
from esr_train.tasks import load_task
from tests.tiny import char_tokenizer, save_pair, tiny_llama
from tools import build_adapter, tally
from tools.tally import worked

ROOT = Path(__file__).parents[2]
ADAPTER = ROOT / tally.DIRECTORY / "adapter"
RECIPE = ROOT / "configs" / "tally.yaml"
LETTERS = "".join(sorted(set(tally.SYSTEM + "0123456789,:.=\n" + "abcdefghijklmnopqrstuvwxyz")))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in the recipe are relative


def test_a_worked_solution() -> None:
    assert worked(["horse", "cup", "whale"]) == "horse: yes, 1\ncup: no, 1\nwhale: yes, 2\n2"


def test_committed_problems_are_those_that_the_script_writes() -> None:
    for name, problems in (
        ("train", tally.train()),
        ("heldout", tally.heldout()),
    ):
        assert Path(tally.DIRECTORY, f"{name}.jsonl").read_text() == tally.as_lines(problems)


def test_the_recipe_s_grader_accepts_worked_solutions_and_no_others() -> None:
    config = load_config(RECIPE)
    assert config.data.system == tally.SYSTEM
    task = load_task(config.data)
    assert (task.count("train"), task.count("heldout")) == (
        tally.TRAIN,
        tally.HELDOUT,
    )
    for split in ("train", "heldout"):
        for problem in task.problems(split, 200, seed=0):
            assert isinstance(problem.prompt, str)
            solution = worked(problem.prompt.split("\n"))
            assert task.score(problem, solution) == {"accuracy": 1.0}
            assert task.score(problem, solution + "0") == {"accuracy": 0.0}
            assert task.score(problem, solution.rpartition("\n")[0]) == {"accuracy": 0.0}


def test_a_count_is_right_where_an_answer_does_not_end() -> None:
    words = tally.heldout()[0]
    right, count = worked(words), tally.answer(words)
    assert tally.grade(right, count) == {"accuracy": 1.0, "counted": 1.0}
    assert tally.grade(right + "\nhorse: yes, 9", count) == {"accuracy": 0.0, "counted": 1.0}
    assert tally.grade(right, count + "0") == {"accuracy": 0.0, "counted": 0.0}
    assert tally.grade("", count) == {"accuracy": 0.0, "counted": 0.0}
    assert tally.grade("\n".join(right.split("\n")[:-2]), count)["counted"] == 0.0


def test_the_card_is_of_the_committed_adapter() -> None:
    card = json.loads((ADAPTER / build_adapter.CARD).read_text())
    assert card["sha256"].keys() == {CONFIG, WEIGHTS}
    for name, digest in card["sha256"].items():
        assert build_adapter.sha256(ADAPTER / name) == digest
    assert (ADAPTER / WEIGHTS).stat().st_size < 6e6
    measured = card["greedy_accuracy"]
    assert measured["problems"] >= 100 and measured["with_adapter"] >= 0.7
    # An adapter whose second matrices were zero would add nothing.
    tensors = load_file(ADAPTER / WEIGHTS)
    assert all(bool(t.any()) for t in tensors.values()) and len(tensors) == 30 * 7 * 2


@pytest.mark.filterwarnings("error:.*copying from a non-meta parameter")
def test_a_dry_run_puts_the_committed_adapter_on_a_model_of_smollm2_s_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ROOT / "tests" / "configs" / "smollm2-135m-instruct.json"
    shutil.copy(sizes, tmp_path / "config.json")
    char_tokenizer(LETTERS).save_pretrained(tmp_path)
    overrides = [f"student.model={tmp_path}", f"teacher.model={tmp_path}"]
    overrides += [f"teacher.adapter={tally.DIRECTORY}/adapter"]
    assert main(["compare", str(RECIPE), *overrides, "--dry-run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    [count] = re.findall(r"student: \w+, ([\d,]+) parameters", printed)
    assert int(count.replace(",", "")) == 134_515_008 + 2_442_240
    assert "\nesr-32: " in printed and "\nfull: " in printed


def test_the_committed_adapter_is_refused_by_a_model_of_another_shape() -> None:
    with pytest.raises(AdapterError, match="cannot be used with this model"):
        load_adapter(tiny_llama(), str(ADAPTER))


def test_the_script_writes_an_adapter_that_the_loader_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_pair(
        tmp_path / "base",
        0,
        LETTERS,
        vocab_size=64,
        max_position_embeddings=512,
    )
    out = tmp_path / "adapter"
    arguments = ["--out", str(out), "--base", base, "--steps", "2", "--problems", "3"]
    assert build_adapter.main([*arguments, "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "step 2/2" in printed and "with adapter: greedy accuracy 0.000 of 3" in printed
    card = json.loads((out / build_adapter.CARD).read_text())
    assert card["sha256"][WEIGHTS] == build_adapter.sha256(out / WEIGHTS)
    stored = load_file(out / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    model = load_adapter(tiny_llama(max_position_embeddings=512), str(out))
    found = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert found and all(bool(p.any()) for p in found.values())
    build_adapter.main([*arguments, "--threads", "1"])
    again = load_file(out / WEIGHTS)
    assert all(torch.equal(stored[name], again[name]) for name in stored)


def test_what_is_learned_is_the_solution_and_its_end() -> None:
    tokenizer = char_tokenizer(LETTERS)
    problems = [["horse", "cup", "whale"], ["pig"]]
    batch = build_adapter._solved(problems, build_adapter._encoder(tokenizer), tokenizer)
    for row, words in enumerate(problems):
        assert tokenizer.decode(batch.prompts[row]).endswith(tally.question(words) + "=")
        assert tokenizer.decode(batch.response(row)) == worked(words) + "<eos>"
