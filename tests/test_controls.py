"""The arms of a comparison on models whose answer is known by construction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esr_kernels import LinearDivergence
from esr_train import checkpoint
from esr_train.config import Config, ConfigError, LossConfig, RolloutConfig
from esr_train.experiment import load_experiment
from esr_train.loss import select, token_weights
from esr_train.metrics import Spans, read_rows
from esr_train.rollout import RolloutBatch
from esr_train.train import Trainer
from tests.tiny import MakeConfig

K = 3  # where the pair below parts
LORA = pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])


def build(config: Config, directory: Path, **options: Any) -> Trainer:
    return Trainer(config, load_experiment(config), directory, 0, **{"save": False, **options})


def parting(trainer: Trainer, at: int) -> None:
    """Let the teacher, who is the student, differ from it from position `at` of a response on, by
    more the later."""
    real = trainer.objective.teacher.hidden_rows

    def hidden_rows(batch: Any) -> Tensor:
        hidden = real(batch)
        shift = torch.randn(hidden.shape[1], generator=torch.Generator().manual_seed(0))
        return hidden + 0.1 * (batch.tokens - at + 1).clamp(min=0)[:, None] * shift

    trainer.objective.teacher.hidden_rows = hidden_rows  # type: ignore[method-assign]


def first_gradient(trainer: Trainer) -> tuple[dict[str, float], RolloutBatch, Tensor]:
    """What step 1 says of its tokens, its rollouts, and the whole gradient as one vector."""
    batch = trainer.source.answers(1).batch
    sums = trainer._gradient(1, batch, Spans())
    gradients = [p.grad for p in trainer.student.parameters() if p.grad is not None]
    return sums, batch, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.fixture
def same(make_config: MakeConfig, pair: tuple[str, str]) -> MakeConfig:
    """Student and teacher are one model; rollouts of 8 tokens."""
    known = {"teacher__model": pair[0], "eval__every": 0, "rollout__max_new_tokens": 8}
    return lambda **changes: make_config(**{**known, **changes})


ARMS: dict[str, dict[str, Any]] = {
    "truncated": {"rollout__max_new_tokens": K},
    "mask-only": {"loss__window_tokens": K},
    "last": {"loss__window": "last", "loss__window_tokens": K},
    "scattered": {"loss__window": "scattered", "loss__window_tokens": K},
    "selected": {
        "loss__window": "selected",
        "loss__window_tokens": K,
        "loss__select_by": ["divergence"],
    },
    "full": {},
}


@LORA
@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_learns_what_is_in_its_window_and_nothing_else(
    same: MakeConfig, tmp_path: Path, arm: str, lora: Any
) -> None:
    """The pair is one model for the first K tokens of a response, and two from there on."""
    trainer = build(same(student__lora=lora, **ARMS[arm]), tmp_path)
    if lora:  # adapters start at zero, where half of them have no gradient
        parameters = dict(trainer.student.named_parameters())
        assert all("lora" in name for name, p in parameters.items() if p.requires_grad)
    parting(trainer, K)
    sums, batch, gradient = first_gradient(trainer)
    assert arm == "truncated" or (batch.lengths > K).any()
    learns = arm not in ("truncated", "mask-only")
    assert (sums["loss"] > 1e-4) == learns
    assert (float(gradient.norm()) > 1e-4) == learns
    # The budget is equal: K tokens of every response that has them.
    budget = batch.lengths if arm == "full" else batch.lengths.clamp(max=K)
    assert sums["trained_tokens"] == int(budget.sum())


@LORA
def test_truncation_and_the_mask_only_arm_take_the_same_steps(
    make_config: MakeConfig, tmp_path: Path, lora: Any
) -> None:
    """What comes after the window costs time and changes nothing."""
    weights, tokens = [], []
    for arm in ("truncated", "mask-only", "full"):
        changes = {"rollout__max_new_tokens": 8, **ARMS[arm], "student__lora": lora}
        trainer = build(make_config(eval__every=0, optim__lr=0.01, **changes), tmp_path / arm)
        trainer.run()
        trained = [p.detach().flatten() for p in trainer.student.parameters() if p.requires_grad]
        weights.append(torch.cat(trained))
        tokens.append(trainer.state["tokens"])
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-3)
    assert (weights[2] - weights[0]).abs().max() > 0.01
    assert tokens[0] < tokens[1]


@pytest.mark.parametrize("arm", ARMS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    same: MakeConfig, tmp_path: Path, arm: str
) -> None:
    sums, _, gradient = first_gradient(build(same(**ARMS[arm]), tmp_path))
    assert abs(sums["loss"]) < 1e-6 and float(gradient.norm()) < 1e-5
    assert sums["trained_tokens"] > 0


@pytest.mark.parametrize("size", [None, 3], ids=["at-once", "micro-batches"])
@pytest.mark.parametrize("denominator", ["token", "trajectory", "fixed"])
def test_selection_trains_on_the_largest_signals_alone(
    make_config: MakeConfig, tmp_path: Path, denominator: str, size: int | None
) -> None:
    """Against autograd on all logits, with the product of divergence and student's entropy."""
    config = make_config(
        eval__every=0,
        optim__micro_batch=size,
        rollout__max_new_tokens=9,
        loss__window="selected",
        loss__window_tokens=2,
        loss__select_by=["divergence", "student_entropy"],
        loss__denominator=denominator,
        loss__fixed_length=4,
    )
    trainer = build(config, tmp_path)
    sums, batch, gradient = first_gradient(trainer)
    trainer.optimizer.zero_grad()

    loss, count = torch.zeros(()), int(batch.lengths.clamp(max=2).sum())
    for row, prompt in enumerate(batch.prompts):
        answer = batch.response(row)
        ids, places = torch.tensor([prompt + answer]), slice(len(prompt) - 1, -1)
        student, teacher = (
            model(ids).logits[0, places, :32].log_softmax(-1)
            for model in (trainer.student, trainer.objective.teacher.model)
        )
        kl = (student.exp() * (student - teacher.detach())).sum(-1)
        entropy = -(student.exp() * student).sum(-1)
        best = (kl * entropy).detach().topk(min(2, len(answer))).indices
        each = {
            "token": count,
            "trajectory": len(best) * len(batch.prompts),
            "fixed": 4 * len(batch.prompts),
        }[denominator]
        loss = loss + kl[best].sum() / each
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.student.parameters()])
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert sums["trained_tokens"] == count < int(batch.lengths.sum())


def _signals(**rows: list[float]) -> LinearDivergence:
    nothing = torch.zeros(len(rows["per_token"]))
    known = {name: torch.tensor(values) for name, values in rows.items()}
    fields = {name: known.get(name, nothing) for name in LinearDivergence._fields}
    return LinearDivergence(**fields)


def test_selection_by_hand() -> None:
    signals = _signals(
        per_token=[0.1, 0.5, 0.3, 0.5, 9.0, 1.0],
        student_entropy=[1.0, 0.1, 1.0, 0.1, 0.0, 0.2],
        teacher_entropy=[5.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    )
    response = torch.tensor([0, 0, 0, 0, 2, 2])

    def kept(size: int, *names: str) -> list[int]:
        loss = LossConfig(window="selected", window_tokens=size, select_by=list(names))
        return select(signals, response, loss).tolist()

    assert kept(1, "divergence") == [1, 4]  # the earlier of equal ones
    assert kept(2, "divergence") == [1, 3, 4, 5]
    assert kept(1, "student_entropy") == [0, 5]
    assert kept(1, "divergence", "student_entropy") == [2, 5]
    assert kept(1, "divergence", "student_entropy", "teacher_entropy") == [0, 5]
    assert kept(9, "teacher_entropy") == [0, 1, 2, 3, 4, 5]


def test_scattered_tokens_are_anywhere_in_a_response_and_as_many_as_asked() -> None:
    lengths = torch.tensor([6, 4, 1])
    batch = RolloutBatch([[3]] * 3, torch.zeros(3, 6), lengths, torch.zeros(3, dtype=torch.bool))
    config = LossConfig(window="scattered", window_tokens=2)
    draws = torch.stack([token_weights(batch, config, (0, step)) > 0 for step in range(400)])
    assert (draws.sum(2) == lengths.clamp(max=2)).all()
    for row, length in enumerate(lengths.tolist()):
        share = min(2, length) / length
        # 400 draws: four standard deviations are 0.1
        assert (draws[:, row, :length].double().mean(0) - share).abs().max() < 0.1
        assert not draws[:, row, length:].any()
    pairs = {tuple(draw[0].nonzero()[:, 0].tolist()) for draw in draws}
    assert len(pairs) == 15  # every pair of 6, neighbours or not


def test_a_growing_rollout_reaches_its_length_at_the_last_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    assert [RolloutConfig(grow_from=2, max_new_tokens=8).length(s, 4) for s in range(1, 5)] == [
        2, 4, 6, 8,
    ]  # fmt: skip
    assert RolloutConfig(grow_from=2, max_new_tokens=8).length(1, 1) == 8
    config = make_config(steps=4, eval__every=0, rollout__max_new_tokens=8)
    growing = make_config(steps=4, eval__every=0, rollout__max_new_tokens=8, rollout__grow_from=2)
    sources = [build(c, tmp_path).source for c in (config, growing)]
    for step, length in ((1, 2), (3, 6)):
        whole, short = (source.answers(step).batch for source in sources)
        assert int(short.lengths.max()) == length
        # The beginning of what a rollout of the whole length would be.
        inside = torch.arange(length) < short.lengths[:, None]
        assert torch.equal(short.tokens[inside], whole.tokens[:, :length][inside])


FROZEN = {"rollout__source": "initial_student", "steps": 4, "optim__lr": 0.02, "eval__every": 0}


def test_frozen_answers_are_those_of_the_initial_student(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    frozen, current = build(make_config(**FROZEN), tmp_path / "a"), None
    wanted = build(make_config(**{**FROZEN, "rollout__source": "student"}), tmp_path / "b")
    untouched = [wanted.source.answers(step) for step in range(1, 5)]
    frozen.run()
    for step, known in enumerate(untouched, start=1):
        found = frozen.source.answers(step)
        assert found.batch.prompts == known.batch.prompts and found.tokens == known.tokens
        assert torch.equal(found.batch.tokens, known.batch.tokens)
    # While the student that has been trained would write something else.
    current = build(make_config(**{**FROZEN, "rollout__source": "student"}), tmp_path / "c")
    current.run()
    assert not torch.equal(current.source.answers(4).batch.tokens, untouched[3].batch.tokens)
    rows = read_rows(tmp_path / "a" / "metrics.jsonl")
    assert all(row["seconds"]["rollout"] > 1e-3 and "logprob_gap" not in row for row in rows)


def test_answers_are_sampled_once_a_prompt(make_config: MakeConfig, tmp_path: Path) -> None:
    """6 prompts, 4 a step: all are seen by step 2, in the middle of which an epoch begins."""
    trainer = build(make_config(**FROZEN, rollout__pool=6), tmp_path)
    trainer.source.prepare(0)
    answers = [trainer.source.answers(step) for step in range(1, 5)]
    by_prompt: dict[tuple[int, ...], set[tuple[tuple[int, ...], ...]]] = {}
    for batch in (found.batch for found in answers):
        for row in range(0, 8, 2):  # two samples a prompt
            both = tuple(tuple(batch.response(row + sample)) for sample in (0, 1))
            by_prompt.setdefault(tuple(batch.prompts[row]), set()).add(both)
    assert len(by_prompt) == 6 and all(len(found) == 1 for found in by_prompt.values())
    sampled = sum(len(text) for (texts,) in by_prompt.values() for text in texts)
    assert [found.tokens > 0 for found in answers] == [True, True, False, False]
    assert sum(found.tokens for found in answers) == sampled
    assert [found.seconds > 0 for found in answers] == [True, True, False, False]


def test_frozen_answers_outlive_an_interruption(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(**{**FROZEN, "checkpoint__every": 2})
    build(config, tmp_path / "whole", save=True).run()
    half = build(config, tmp_path / "halves", save=True)
    real = half.step

    def step(number: int, interrupt: Any) -> dict[str, Any]:
        if number == 3:
            raise SystemExit
        return real(number, interrupt)

    half.step = step  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        half.run()
    answers = tmp_path / "halves" / "checkpoints" / "answers.safetensors"
    kept = answers.read_bytes()
    answers.unlink()
    with pytest.raises(checkpoint.CheckpointError, match="goes on at step 3, .*sampled again"):
        build(config, tmp_path / "halves", save=True).run()
    answers.write_bytes(kept)
    build(config, tmp_path / "halves", save=True).run()
    losses = [
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


SFT = {"rollout__source": "teacher", "loss__divergence": "cross_entropy", "eval__every": 0}


@LORA
def test_fine_tuning_is_the_cross_entropy_of_the_teachers_answers(
    make_config: MakeConfig, tmp_path: Path, lora: Any
) -> None:
    config = make_config(**SFT, student__lora=lora, optim__micro_batch=3)
    trainer = build(config, tmp_path)
    trainer.source.prepare(0)
    sums, batch, gradient = first_gradient(trainer)
    teacher = trainer.objective.teacher
    own = teacher.rollout.generate(batch.prompts[::2], 2, 6, 1.0, (0, "rollout", 1))
    assert torch.equal(own.tokens, batch.tokens)
    trainer.optimizer.zero_grad()

    loss = torch.zeros(())
    for row, prompt in enumerate(batch.prompts):
        answer = torch.tensor(batch.response(row))
        ids = torch.cat([torch.tensor(prompt), answer])[None]
        logits = trainer.student(ids).logits[0, len(prompt) - 1 : -1, :32]
        loss = loss + torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
    loss = loss / int(batch.lengths.sum())
    loss.backward()
    wanted = [p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None]
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert sums["cross_entropy"] / sums["trained_tokens"] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.cat(wanted), rtol=1e-3, atol=1e-6)


def test_fine_tuning_runs_no_teacher_in_a_step_and_learns_its_answers(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(**SFT, steps=30, rollout__pool=8, optim__lr=0.02)
    trainer = build(config, tmp_path)
    trainer.run()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert set(rows[0]["seconds"]) == {"rollout", "student"} and "divergence" not in rows[0]
    assert rows[-1]["cross_entropy"] < 0.5 * rows[0]["cross_entropy"]
    assert rows[0]["tokens"] > 0 and rows[-1]["tokens"] == 0
    assert trainer.state["tokens"] == sum(row["tokens"] for row in rows)


def test_a_teacher_with_another_tokenizer_writes_no_answers(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    experiment = load_experiment(make_config(eval__every=0))
    ids = torch.arange(32)
    vocabulary = replace(experiment.alignment.vocabulary, student_ids=ids, teacher_ids=ids)
    experiment.alignment.vocabulary = vocabulary
    with pytest.raises(ConfigError, match="rollout.source: got 'teacher', must be the student"):
        Trainer(make_config(**SFT), experiment, tmp_path, 0, save=False)
