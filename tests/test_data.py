"""Prompts from files: columns, splits, messages, templates; bad input names its key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esr_train.config import ConfigError, DataConfig
from esr_train.data import PromptEncoder, PromptStream, TokenizedTask
from esr_train.tasks import Problem, load_task
from tests.tiny import char_tokenizer

ROWS = [{"question": f"{n}+1=", "result": str(n + 1)} for n in range(40)]
COLUMNS = {"prompt": "question", "answer": "result", "grader": "exact"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_json_lines_and_parquet_hold_the_same_problems(tmp_path: Path) -> None:
    import pandas

    lines = write(tmp_path / "a.jsonl", ROWS)
    pandas.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    tasks = [
        load_task(DataConfig(task=task, **COLUMNS)) for task in (lines, str(tmp_path / "a.parquet"))
    ]
    for split, count in (("train", 36), ("heldout", 4)):
        first, second = (task.problems(split, count, 3) for task in tasks)
        assert first == second and tasks[0].count(split) == count
    assert tasks[0].problems("heldout", 1, 0) == [Problem("9+1=", "10")]
    assert tasks[0].problems("train", 36, 0) != tasks[0].problems("train", 36, 1)
    assert tasks[0].score(Problem("9+1=", "10"), "so it is\n10 ") == {"accuracy": 1.0}


def test_a_heldout_file_is_not_trained_on(tmp_path: Path) -> None:
    config = DataConfig(
        task=write(tmp_path / "a.jsonl", ROWS),
        heldout=write(tmp_path / "b.jsonl", ROWS[5:8]),
        **COLUMNS,
    )
    task = load_task(config)
    prompts = [problem.prompt for problem in task.problems("train", 37, 0)]
    assert [p.prompt for p in task.problems("heldout", 3, 0)] == ["5+1=", "6+1=", "7+1="]
    assert not {"5+1=", "6+1=", "7+1="} & set(prompts) and len(set(prompts)) == 37


def test_messages_and_teacher_prompts(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rows = [
        {"messages": [*turns, {"role": "user", "content": str(n)}], "hint": f"{n}={n}"}
        for n in range(20)
    ]
    config = DataConfig(
        task=write(tmp_path / "a.jsonl", rows), prompt="messages", teacher_prompt="hint"
    )
    tokenizer = char_tokenizer()
    task = load_task(config)
    tokenized = TokenizedTask(task, tokenizer, config, tokenizer)
    (problem,) = task.problems("heldout", 1, 0)
    assert problem.prompt == (("user", "1"), ("assistant", "2"), ("user", "9"))
    assert problem.answer is None and task.score(problem, "9") is None
    assert tokenizer.decode(tokenized.ids(problem)).startswith("129")
    assert tokenizer.decode(tokenized.teacher_ids(problem)).startswith("9=9")
    stream = PromptStream(tokenized, 2, 0)
    own = stream.teacher_prompts_for(1)
    assert own == [tokenized.teacher_ids(problem) for problem in stream.problems_for(1)]
    assert own != stream.prompts_for(1)


def test_the_chat_template_takes_a_system_message_and_keywords() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}.{{ m['content'] }}{% endfor %}"
        "{% if thinking %}+{% endif %}="
    )

    def text(prompt: Any, **keys: Any) -> str:
        ids = PromptEncoder(tokenizer, DataConfig(**keys))(prompt)
        decoded: str = tokenizer.decode(ids)
        return decoded.replace(" ", "")

    assert text("1", chat=False) == "1"
    assert text("1", system="2").endswith(".21=") or "2" in text("1", system="2")
    assert text("1", chat_template_kwargs={"thinking": True}).endswith("1+=")
    assert text("1").endswith("1=") and not text("1").endswith("+=")
    with pytest.raises(ConfigError, match="data.system: must be null, a prompt has a system"):
        text((("system", "1"),), system="2")


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (ROWS, {}, "data.prompt: got 'prompt', but .* has the columns 'question', 'result'"),
        (ROWS, {"prompt": "question", "answer": "x", "grader": "exact"}, "data.answer: got 'x'"),
        (ROWS, {"prompt": "question", "answer": "result"}, "data.grader: got None, must be given"),
        (ROWS, {"prompt": "question", "grader": "exact"}, "data.answer: got None, must be given"),
        (ROWS, {**COLUMNS, "grader": "maths"}, "data.grader: got 'maths', allowed are 'exact'"),
        (ROWS, {**COLUMNS, "grader": "nowhere:f"}, "data.grader: got 'nowhere:f': No module"),
        (ROWS, {**COLUMNS, "grader": "python"}, "set data.allow_code=true"),
        (ROWS, {**COLUMNS, "heldout": "no.jsonl"}, "data.heldout: 'no.jsonl' is not a file"),
        (ROWS, {**COLUMNS, "heldout": "test"}, "data.heldout: got 'test', must be a .jsonl, .json"),
        (ROWS, {**COLUMNS, "subset": "main"}, "data.subset: .*must be null for a file"),
        (ROWS[:5], COLUMNS, "data.heldout: got None, but .* has 5 distinct prompts"),
        ([], COLUMNS, "data.task: .* has no rows"),
        ([{"question": 3, "result": "4"}], COLUMNS, "data.prompt: row 1 of .*: got 3, must be"),
        ([{"question": " ", "result": "4"}], COLUMNS, "data.prompt: row 1 of .*: got ' '"),
        ([{"question": "1", "result": None}], COLUMNS, "data.answer: row 1 of .* has no 'result'"),
        (
            [{"question": [{"role": "user", "text": "1"}], "result": "4"}],
            COLUMNS,
            "got the message .*must be a role and a content",
        ),
    ],
)
def test_bad_data_names_the_key(tmp_path: Path, rows: Any, keys: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        load_task(DataConfig(task=path, **keys))


def test_bad_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "1"}\n{"prompt": ')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n' * 20)
    for name, message in (
        (str(tmp_path / "latin.jsonl"), "data.task: .*latin.jsonl' is not UTF-8 text .*0xe9"),
        (str(tmp_path / "broken.jsonl"), "data.task: .*could not be read"),
        ("missing.jsonl", "'missing.jsonl' is not a file"),
        ("reasoning_gym:nothing", "reasoning-gym has no dataset 'nothing'"),
        ("summs", "allowed are 'sums', 'prompts'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_task(DataConfig(task=name))
    with pytest.raises(ConfigError, match="data.task: got 'a.csv', allowed are"):
        load_task(DataConfig(task="a.csv", answer="answer", grader="exact"))
    with pytest.raises(ConfigError, match="data.grader: got 'exact', but data.task 'sums' has"):
        load_task(DataConfig(grader="exact"))


def test_a_task_of_reasoning_gym_repeats_splits_and_scores() -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task(DataConfig(task="reasoning_gym:chain_sum"))
    train, heldout = task.problems("train", 300, 0), task.problems("heldout", 30, 0)
    assert train == load_task(DataConfig(task="reasoning_gym:chain_sum")).problems("train", 300, 0)
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    problem = heldout[0]
    right = {"accuracy": 1.0, "solved": 1.0}
    assert task.score(problem, f"well,\n{problem.answer}") == right
    assert task.score(problem, f"<answer>{problem.answer}</answer> 7")["accuracy"] == 1.0
    wrong = task.score(problem, "no idea")
    assert wrong["accuracy"] < 0.5 and wrong["solved"] == 0


@pytest.mark.parametrize("name", ["mini_sudoku", "rotate_matrix"])
def test_an_answer_of_reasoning_gym_may_have_several_lines(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = load_task(DataConfig(task=f"reasoning_gym:{name}"))
    for problem in task.problems("heldout", 5, 0):
        right = str(problem.answer)
        assert "\n" in right
        for response in (right, f"It is:\n\n{right}\n", f"<answer>{right}</answer>"):
            assert task.score(problem, response) == {"accuracy": 1.0, "solved": 1.0}
        assert task.score(problem, right.rsplit("\n", 1)[0])["solved"] == 0
    first, rest = right.split("\n", 1)
    some = task.score(problem, f"{first[::-1]}\n{rest}")
    assert some["solved"] == 0 and some["accuracy"] < 1


def test_the_digest_follows_the_problems(tmp_path: Path) -> None:
    def digest(rows: list[dict[str, Any]], seed: int = 0) -> str:
        config = DataConfig(task=write(tmp_path / "a.jsonl", rows), **COLUMNS)
        return PromptStream(
            TokenizedTask(load_task(config), char_tokenizer(), config), 2, seed
        ).digest

    assert digest(ROWS) == digest(ROWS) != digest(ROWS[1:])
    assert digest(ROWS) != digest(ROWS, seed=1)
