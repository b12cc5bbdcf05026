"""Tasks: disjoint repeatable splits, answers judged rightly, and the built-in models."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from esr_train.config import ConfigError, DataConfig
from esr_train.tasks import Problem, builtin_model_path
from esr_train.tasks import load_task as load_task_of
from esr_train.tasks.sums import step_by_step, summands_of, wordy_guess


def load_task(name: str):
    return load_task_of(DataConfig(task=name))


@pytest.mark.parametrize("name", ["sums", "prompts"])
def test_problems_repeat_for_a_seed_and_differ_between_seeds(name):
    task = load_task(name)
    assert task.problems("train", 50, seed=3) == load_task(name).problems("train", 50, seed=3)
    assert task.problems("train", 50, seed=3) != task.problems("train", 50, seed=4)
    assert task.problems("train", 10, seed=3) == task.problems("train", 50, seed=3)[:10]
    assert len(task.problems("heldout", 17, seed=0)) == 17


def test_no_reordering_of_a_training_sum_is_held_out():
    task = load_task("sums")
    seen = {
        split: {
            tuple(sorted(summands_of(problem)))
            for seed in range(5)
            for problem in task.problems(split, 2000, seed)
        }
        for split in ("train", "heldout")
    }
    assert not seen["train"] & seen["heldout"]
    for summands in list(seen["heldout"])[:200]:
        shuffled = random.Random(0).sample(summands, len(summands))
        assert task.split_of(shuffled) == "heldout"


def test_about_a_tenth_of_the_sums_is_held_out():
    task, rng = load_task("sums"), random.Random(0)
    splits = [task.split_of([rng.randint(10, 99) for _ in range(4)]) for _ in range(5000)]
    assert 0.08 < splits.count("heldout") / len(splits) < 0.12


def test_prompt_splits_are_disjoint_and_cover_the_file():
    task = load_task("prompts")
    train = {problem.prompt for problem in task.problems("train", 256, seed=0)}
    heldout = {problem.prompt for problem in task.problems("heldout", 64, seed=9)}
    assert len(train) == 256 and len(heldout) == 64 and not train & heldout


def test_every_step_by_step_answer_is_right_and_long():
    task = load_task("sums")
    for problem in task.problems("train", 1000, seed=0):
        answer = step_by_step(summands_of(problem))
        assert task.score(problem, answer) == {"accuracy": 1.0}
        assert 130 <= len(answer) <= 170
        for left, right in (part.split("=") for part in _equations(answer)):
            assert sum(map(int, left.split("+"))) == int(right)


def test_most_guesses_are_wrong_and_longer_than_the_steps():
    task, rng = load_task("sums"), random.Random(0)
    problems = task.problems("train", 1000, seed=0)
    guesses = [wordy_guess(summands_of(problem), rng) for problem in problems]
    scores = map(task.score, problems, guesses)
    right = sum(score["accuracy"] for score in scores) / len(problems)
    assert 0 < right < 0.05
    assert all(160 <= len(guess) <= 220 and "the answer is " in guess for guess in guesses)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("the answer is 147.", 1.0),
        ("the answer is 12. no, the answer is 147", 1.0),
        ("the answer is 147. no, the answer is 12.", 0.0),
        ("the answer is 1470.", 0.0),
        ("the answer is ", 0.0),
        ("147", 0.0),
        ("", 0.0),
    ],
)
def test_score_reads_the_last_answer(response, score):
    scores = load_task("sums").score(Problem("23+45+67+12=", "147"), response)
    assert scores == {"accuracy": score}


def test_prompts_have_no_score():
    task = load_task("prompts")
    assert task.score(Problem("Why do cats purr?"), "They like it.") is None
    assert [role for role, _ in task.problems("train", 1, 0)[0].prompt] == ["user"]


def test_built_in_models_are_fp32_with_their_own_eos_and_fit_the_size_limit():
    models = {
        name: AutoModelForCausalLM.from_pretrained(builtin_model_path(name))
        for name in ("sums-teacher", "sums-student")
    }
    for name, model in models.items():
        config, generation = model.config, model.generation_config
        assert (builtin_model_path(name) / "model.safetensors").stat().st_size < 4_000_000
        assert model.dtype == torch.float32
        assert config.eos_token_id == generation.eos_token_id != config.pad_token_id


def test_unknown_names_are_refused_with_the_allowed_ones():
    with pytest.raises(ConfigError, match="'summs', allowed are 'sums', 'prompts'"):
        load_task("summs")
    with pytest.raises(ValueError, match="allowed are 'sums-teacher', 'sums-student'"):
        builtin_model_path("sums-tutor")


@pytest.mark.parametrize("name", ["sums", "prompts"])
def test_bad_requests_are_refused(name):
    with pytest.raises(ValueError, match="split: got 'test', allowed are 'train', 'heldout'"):
        load_task(name).problems("test", 1, seed=0)
    with pytest.raises(ValueError, match="count: got 0"):
        load_task(name).problems("train", 0, seed=0)


def test_bad_prompt_files_are_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, reason in (
        ("missing.txt", "No such file"),
        ("empty.txt", "holds no prompt"),
        ("latin.txt", "not UTF-8"),
    ):
        with pytest.raises(ConfigError, match=f"data.task: prompt file: .*{name}.*{reason}"):
            load_task(f"prompts:{tmp_path / name}")


def test_more_prompts_than_there_are_are_refused(tmp_path: Path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(["a", "b", "", "b", "c", "d", "e", "f"]))  # a repeat and a blank
    task = load_task(f"prompts:{path}")
    with pytest.raises(ValueError, match="count: got 2, but .*mine.txt' has 1 heldout prompts"):
        task.problems("heldout", 2, seed=0)
    assert task.problems("heldout", 1, seed=0) == [Problem((("user", "e"),))]
    assert task.count("train") == 5
    texts = [problem.prompt[0][1] for problem in task.problems("train", 5, seed=0)]
    assert sorted(texts) == ["a", "b", "c", "d", "f"]


def _equations(answer: str) -> list[str]:
    return [word.strip(".,") for word in answer.split() if "=" in word]


class _Own:
    name = "own"

    def count(self, split):
        return 1

    def problems(self, split, count, seed):
        return [Problem("1+1=", "2")]

    def score(self, problem, response):
        return {"accuracy": 1.0}


def test_a_task_of_ones_own_is_named_by_its_import_path():
    task = load_task(f"{__name__}:_Own")
    assert isinstance(task, _Own) and task.problems("train", 1, 0)[0].answer == "2"


@pytest.mark.parametrize(
    "path, message",
    [
        ("no_such_module:Task", "No module named 'no_such_module'"),
        (f"{__name__}:no_such_task", "no_such_task"),
        (f"{__name__}:__name__", "is not a function"),
        ("builtins:dict", "a dict without name, count, problems, score"),
        (":Task", "got ':Task'"),
    ],
)
def test_what_is_no_task_is_refused(path, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_task(path)
