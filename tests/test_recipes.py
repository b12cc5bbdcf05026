"""Every recipe: a dry run on the sizes of the models that it names, and two steps of tiny ones."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from esr_train.cli import main
from esr_train.config import ConfigError, load_config, with_overrides
from esr_train.grading.python import python_grader
from esr_train.metrics import read_rows
from tests.test_train import build
from tests.tiny import ALPHABET, char_tokenizer, save_pair

ROOT = Path(__file__).parents[1]
SIZES = ROOT / "tests" / "configs"
RECIPES = (
    "paper-math",
    "qwen3-1.7b",
    "gemma2-from-qwen3",
    "full-finetuning",
    "code",
    "function-calling",
    "own-data",
)
# Parameters by the model cards, and by the report of Gemma 2; from memory, as the files are.
CARDS = {
    "qwen2.5-math-1.5b": 1.54e9,
    "qwen3-0.6b": 0.60e9,
    "qwen3-1.7b": 1.72e9,
    "qwen3-4b": 4.02e9,
    "qwen3-8b": 8.19e9,
    "gemma-2-2b-it": 2.61e9,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .?"


def size_of(model: str) -> dict[str, Any]:
    """The committed numbers of a hub id."""
    name = model.rpartition("/")[2].lower()
    found: dict[str, Any] = json.loads((SIZES / f"{name}.json").read_text())
    return found


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides that put directories in place of hub ids, and a file in place of the data."""

    def make(recipe: str, tiny: bool) -> list[str]:
        config = load_config(ROOT / "configs" / f"{recipe}.yaml")
        overrides = []
        for who, spec in (("student", config.student), ("teacher", config.teacher)):
            numbers = size_of(spec.model) | (TINY if tiny else {})
            directory = tmp_path / who
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(numbers))
            if tiny:
                torch.manual_seed(who == "teacher")
                own = AutoConfig.from_pretrained(directory)
                AutoModelForCausalLM.from_config(own).save_pretrained(directory)
            other = "gemma" in config.student.model and who == "teacher"
            char_tokenizer(LETTERS[::-1] if other else LETTERS).save_pretrained(directory)
            overrides.append(f"{who}.model={directory}")
        answer = "1" if config.data.grader != "function_call" else '[{"f": {"x": [1]}}]'
        rows = [
            {config.data.prompt: f"what is {name}?", config.data.answer: answer}
            for name in LETTERS[:20]
        ]
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides += [f"data.task={data}", "data.subset=null", "data.heldout=null"]
        overrides.append("eval.problems=null")  # there are fewer than a recipe asks for
        return overrides + ["data.allow_code=true"] * (config.data.grader == "python")

    return make


def needs_namespaces(recipe: str) -> None:
    if recipe == "code":
        try:
            python_grader()
        except ConfigError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("name", CARDS)
def test_the_committed_sizes_are_those_of_the_model_cards(name: str) -> None:
    config = AutoConfig.from_pretrained(SIZES / f"{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == pytest.approx(CARDS[name], rel=7e-3)
    assert type(model).__name__ == config.architectures[0]


def test_every_recipe_is_here() -> None:
    paths = (ROOT / "configs").glob("*.yaml")
    assert {p.stem for p in paths if "/" in load_config(p).student.model} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_of_the_published_sizes(
    recipe: str, files: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    needs_namespaces(recipe)
    command = "train" if recipe == "own-data" else "compare"
    path = str(ROOT / "configs" / f"{recipe}.yaml")
    assert main([command, path, *files(recipe, tiny=False), "--dry-run", "--on", "h100"]) == 0
    printed = capsys.readouterr().out
    config = load_config(Path(path))
    assert "predicted for NVIDIA H100" in printed and "DOES NOT FIT" not in printed
    for arm in config.arms:
        assert f"\n{arm['name']}: {config.steps} steps" in printed
    count = CARDS[config.student.model.rpartition("/")[2].lower()]
    [found] = re.findall(r"student: \w+, ([\d,]+) parameters", printed)
    adapters = 0.05 if config.student.lora else 0.007
    assert count * 0.993 < int(found.replace(",", "")) < count * (1 + adapters)


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_tiny_models_of_the_same_architectures(
    recipe: str, files: Callable[..., list[str]], tmp_path: Path
) -> None:
    needs_namespaces(recipe)
    config = load_config(ROOT / "configs" / f"{recipe}.yaml", files(recipe, tiny=True))
    changes = {"steps": 2, "rollout.prompts": 3, "rollout.max_new_tokens": 6, "eval.every": 0}
    trainer = build(with_overrides(config, changes), tmp_path / "run")
    before = [p.clone() for p in trainer.student.parameters() if p.requires_grad]
    trainer.run()
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["divergence"] > 0 for row in rows)
    after = [p for p in trainer.student.parameters() if p.requires_grad]
    assert not all(torch.equal(*both) for both in zip(before, after, strict=True))


def test_the_commands_for_a_newcomer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file and the commands of README, with tiny models in place of those of the recipe."""
    readme = (ROOT / "README.md").read_text()
    [section] = re.findall("<!-- own-data:start -->(.*?)<!-- own-data:end -->", readme, re.DOTALL)
    [rows] = re.findall("```json\n(.*?)```", section, re.DOTALL)
    [commands] = re.findall("```bash\n(.*?)```", section, re.DOTALL)
    assert len([json.loads(line) for line in rows.splitlines()]) == 10
    lines = [line.partition("#")[0] for line in commands.splitlines() if line.strip()]
    assert 1 <= len(lines) < 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "questions.jsonl").write_text(rows)
    for who, seed in (("student", 0), ("teacher", 1)):
        save_pair(tmp_path / who, seed, ALPHABET, max_position_embeddings=1024)
    small = ["student.model=student", "teacher.model=teacher", "steps=2", "eval.max_new_tokens=9"]
    for line in lines:
        program, command, *arguments = shlex.split(line)
        assert program == "esr-train"
        overrides = [] if command == "export" else small
        assert main([command, *arguments, *overrides]) == 0, capsys.readouterr().err
    [made] = [p for p in tmp_path.iterdir() if p.name not in _MADE_HERE]
    model: Any = AutoModelForCausalLM.from_pretrained(made)
    assert model.num_parameters() > 0


_MADE_HERE = {"configs", "questions.jsonl", "student", "teacher", "runs"}
