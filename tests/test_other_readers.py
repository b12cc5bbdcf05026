"""Training where the teacher reads something else: another tokenizer, or a prompt of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esr_train.checkpoint import CheckpointError
from esr_train.config import Config, ConfigError
from esr_train.experiment import load_experiment
from esr_train.metrics import read_rows
from esr_train.train import Trainer
from tests.test_vocabulary import byte_level, unigram
from tests.tiny import ALPHABET, MakeConfig, char_tokenizer, save_pair, tiny_llama


def save(directory: Path, tokenizer: Any, seed: int) -> str:
    end = tokenizer.eos_token_id
    changes = {"vocab_size": len(tokenizer) + 3, "eos_token_id": end, "pad_token_id": end}
    tiny_llama(seed, **changes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("others")
    return save(root / "a", byte_level(), 0), save(root / "b", unigram(), 1)


def questions(path: Path, **columns: Any) -> str:
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), **columns} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(config: Config, directory: Path) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = Trainer(config, load_experiment(config), directory, 0, save=False)
    trainer.run()
    return trainer, read_rows(directory / "metrics.jsonl")


def plain_loss(trainer: Trainer, step: int, response: Any) -> float:
    """The reverse KL of a step's rollouts between two models that each read their own tokens,
    written with whole logits; `response(batch, row)` gives (student's rows, student's ids,
    teacher's rows, teacher's ids, classes of both) of a response."""
    batch = trainer.rollout.generate(
        trainer.prompts.prompts_for(step), 2, 6, 1.0, (0, "rollout", step)
    )
    values = []
    for row in range(len(batch.prompts)):
        at, ids, read_at, read, classes = response(batch, row)
        s = trainer.student(torch.tensor([ids])).logits[0, at][:, classes[0]].double()
        t = (
            trainer.objective.teacher.model(torch.tensor([read]))
            .logits[0, read_at][:, classes[1]]
            .double()
        )
        log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(values).mean().detach())


def test_other_tokenizers(make_config: MakeConfig, others: tuple[str, str], tmp_path: Path) -> None:
    config = make_config(
        student={"model": others[0]},
        teacher={"model": others[1]},
        data={"task": questions(tmp_path / "a.jsonl")},
        optim__lr=1e-9,
        steps=1,
        eval__teacher_text=0,
        eval__student_text=6,
        eval__position_bins=[2],
    )
    trainer, (row,) = run(config, tmp_path)
    vocabulary, alignment = trainer.objective.alignment.vocabulary, trainer.objective.alignment
    assert not vocabulary.same_tokens

    def response(batch: Any, number: int) -> Any:
        positions, tokens = alignment._teacher_tokens(batch, number)
        start, own = len(batch.prompts[number]), trainer.prompts.teacher_prompts_for(1)
        prompt = own[number // 2]
        return (
            [start - 1 + position for position in positions],
            batch.prompts[number] + batch.response(number),
            [len(prompt) - 1 + position for position in positions.values()],
            prompt + tokens,
            (vocabulary.student_ids, vocabulary.teacher_ids),
        )

    assert row["loss"] == pytest.approx(plain_loss(trainer, 1, response), rel=1e-4)
    assert 0 < row["aligned_share"] <= 1 and 0 < row["student_shared_mass"] <= 1.0001
    assert 0 < row["teacher_shared_mass"] <= 1.0001
    metrics = read_rows(tmp_path / "evals.jsonl")[0]["metrics"]
    assert metrics["student_kl"] > 0 and "student_kl_0_1" in metrics
    with pytest.raises(ConfigError, match="eval.teacher_text: got 6, must be 0"):
        load_experiment(make_config(student={"model": others[0]}, teacher={"model": others[1]}))


def test_the_teacher_reads_a_prompt_of_its_own(make_config: MakeConfig, tmp_path: Path) -> None:
    data = {
        "task": questions(tmp_path / "a.jsonl", hint="1+2=3 "),
        "answer": "answer",
        "grader": "exact",
    }
    data["teacher_prompt"] = "hint"
    config = make_config(data=data, optim__lr=1e-9, steps=1, eval__samples=3)
    trainer, (row,) = run(config, tmp_path)
    hint = list(char_tokenizer()("1+2=3 ")["input_ids"])
    (own,) = {tuple(ids) for ids in trainer.prompts.teacher_prompts_for(1)}
    assert list(own)[: len(hint)] == hint

    def response(batch: Any, number: int) -> Any:
        start, answer = len(batch.prompts[number]), batch.response(number)
        classes = slice(0, trainer.objective.alignment.vocabulary.classes)
        return (
            slice(start - 1, start - 1 + len(answer)),
            batch.prompts[number] + answer,
            slice(len(own) - 1, len(own) - 1 + len(answer)),
            list(own) + answer,
            (classes, classes),
        )

    assert row["loss"] == pytest.approx(plain_loss(trainer, 1, response), rel=1e-4)
    assert "aligned_share" not in row
    metrics = read_rows(tmp_path / "evals.jsonl")[0]["metrics"]
    assert {"greedy_accuracy", "sampled_accuracy", "pass_at_3", "heldout_kl"} <= metrics.keys()


def test_a_longer_vocabulary_is_used_as_far_as_both_have_it(
    make_config: MakeConfig, tmp_path: Path, pair: tuple[str, str]
) -> None:
    teacher = save_pair(tmp_path / "teacher", seed=3, alphabet=ALPHABET + "XY", vocab_size=40)
    config = make_config(teacher={"model": teacher}, steps=1)
    trainer, (row,) = run(config, tmp_path / "run")
    assert trainer.objective.alignment.vocabulary.classes == len(char_tokenizer()) < 32
    assert (
        trainer.rollout.classes
        == trainer.objective.teacher.rollout.classes
        == len(char_tokenizer())
    )
    assert row["loss"] > 0


def test_a_run_does_not_go_on_with_other_data(make_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    config = make_config(data={"task": questions(path)}, steps=1, eval__every=0)

    def train(config: Config) -> None:
        Trainer(config, load_experiment(config), tmp_path / "run", 0).run()

    train(config)
    train(make_config(data={"task": questions(path)}, steps=2, eval__every=0))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(CheckpointError, match="was trained on other problems than data.task"):
        train(make_config(data={"task": str(path)}, steps=3, eval__every=0))


def test_answers_that_cannot_be_checked_are_told_once(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, first in (("train", 0), ("heldout", 50)):
        rows = [json.dumps({"question": f"{number}="}) for number in range(first, first + 50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    files = {
        "data__task": str(tmp_path / "train.jsonl"),
        "data__heldout": str(tmp_path / "heldout.jsonl"),
        "data__prompt": "question",
    }
    run(make_config(**files, steps=2), tmp_path / "run")
    (message,) = [record.message for record in caplog.records if "report.metric" in record.message]
    assert "no 'greedy_accuracy'; they have response_length" in message
