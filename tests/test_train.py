from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esr_train import checkpoint
from esr_train.config import (
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    OptimConfig,
    with_overrides,
)
from esr_train.data import PromptStream, TokenizedTask
from esr_train.experiment import load_experiment
from esr_train.loss import token_weights
from esr_train.metrics import PeakMemory, Spans, read_rows
from esr_train.micro_batches import micro_batches
from esr_train.optim import learning_rate
from esr_train.rollout import ContextError, RolloutBatch
from esr_train.tasks import load_task
from esr_train.teacher import hidden_rows, sequences
from esr_train.train import Trainer, TrainingError
from tests.tiny import MakeConfig, char_tokenizer, tiny_llama


def build(config: Config, directory: Path, seed: int = 0, **options: Any) -> Trainer:
    return Trainer(config, load_experiment(config), directory, seed, **{"save": False, **options})


def losses(directory: Path) -> list[float]:
    return [row["loss"] for row in read_rows(directory / "metrics.jsonl")]


def test_a_run_repeats_bit_for_bit_and_another_seed_does_not(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = build(make_config(), tmp_path / name, seed)
        trainer.run()
        runs.append((losses(tmp_path / name), trainer.student.state_dict()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])


def test_rows_have_every_key_of_the_contract(make_config: MakeConfig, tmp_path: Path) -> None:
    build(make_config(), tmp_path).run()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    row = rows[0]
    expected = (
        "step loss divergence student_entropy teacher_entropy agreement response_length eos_rate "
        "tokens trained_tokens lr grad_norm seconds peak_bytes repetition logprob_gap alarms"
    )
    assert set(row) == set(expected.split())
    assert set(row["seconds"]) == set(row["peak_bytes"]) == {"rollout", "teacher", "student"}
    assert row["tokens"] == row["trained_tokens"] == row["response_length"] * 8
    assert row["loss"] == pytest.approx(row["divergence"], rel=1e-5)
    evals = read_rows(tmp_path / "evals.jsonl")
    assert [row["step"] for row in evals] == [0, 2, 3]
    assert evals[0]["train_seconds"] == 0 and evals[0]["tokens"] == 0
    assert evals[2]["tokens"] == sum(row["tokens"] for row in rows)
    spent = sum(sum(row["seconds"].values()) for row in rows)
    assert evals[2]["train_seconds"] == pytest.approx(spent)
    assert set(evals[0]["metrics"]) == set(
        "greedy_accuracy sampled_accuracy response_length eos_rate "
        "heldout_kl heldout_reverse_kl top1_agreement".split()
    )
    assert {"step", "prompt", "response"} == set(read_rows(tmp_path / "samples.jsonl")[0])


def test_a_metric_that_is_not_evaluated_is_refused_before_the_first_step(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = with_overrides(make_config(), {"report.metric": "greedy_acuracy", "eval.every": 1})
    with pytest.raises(ConfigError, match="report.metric: got 'greedy_acuracy'.* greedy_accuracy"):
        build(config, tmp_path).run()
    assert not read_rows(tmp_path / "metrics.jsonl")


def test_training_brings_the_student_to_the_teacher(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=40, optim__lr=0.01, eval__every=40, rollout__prompts=16)
    build(config, tmp_path).run()
    first, last = (row["metrics"]["heldout_kl"] for row in read_rows(tmp_path / "evals.jsonl"))
    assert last < 0.5 * first


def test_micro_batches_give_the_gradient_of_the_whole_batch(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for denominator in ("token", "trajectory", "fixed"):
        gradients = []
        for size, tokens in ((None, None), (3, None), (None, 40), (3, 40)):
            config = make_config(
                optim__micro_batch=size,
                optim__max_tokens=tokens,
                loss__fixed_length=6,
                loss__denominator=denominator,
            )
            trainer = build(config, tmp_path)
            prompts = trainer.prompts.prompts_for(1)
            batch = trainer.rollout.generate(prompts, 2, 6, 1.0, (0,))
            assert len(set(batch.lengths.tolist())) > 1
            sums = trainer._gradient(1, batch, Spans())
            gradients.append(
                [sums["loss"], *(p.grad.clone() for p in trainer.student.parameters())]
            )
        for whole, *parts in zip(*gradients, strict=True):
            for part in parts:
                torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)


def test_micro_batches_hold_a_budget_of_tokens_with_their_padding() -> None:
    prompts, lengths = [[3] * n for n in (5, 1, 2, 30, 5, 5)], torch.tensor([5, 2, 2, 5, 6, 5])
    batch = RolloutBatch(prompts, torch.zeros(6, 6), lengths, torch.zeros(6, dtype=torch.bool))

    def widths(teacher: list[list[int]] | None = None, **limits: int) -> list[list[int]]:
        """Tokens of each response, by micro-batch."""
        parts = micro_batches(batch, teacher, OptimConfig(**limits))
        assert sorted(torch.cat(parts).tolist()) == list(range(6))
        return [[len(prompts[r]) + int(lengths[r]) for r in part.tolist()] for part in parts]

    assert widths() == [[3, 4, 10, 10, 11, 35]]
    assert widths(max_tokens=30) == [[3, 4, 10], [10, 11], [35]]
    assert widths(max_tokens=30, micro_batch=2) == [[3, 4], [10, 10], [11], [35]]
    # 35 does not fit and is alone; 22 holds 11 twice.
    assert widths(max_tokens=22) == [[3, 4], [10, 10], [11], [35]]
    longer = [[3] * 9] * 3 + prompts[3:]
    assert widths(longer, max_tokens=30)[0] == [10, 3]  # which the teacher reads as 11


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_the_fused_loss_and_plain_pytorch_train_alike(
    make_config: MakeConfig, tmp_path: Path, divergence: str
) -> None:
    curves = []
    for impl in ("auto", "reference"):
        config = make_config(loss__impl=impl, loss__divergence=divergence, eval__every=0)
        build(config, tmp_path / impl).run()
        curves.append(losses(tmp_path / impl))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert len(set(curves[0])) == 3


def test_the_rows_are_those_that_predict_the_response(make_config: MakeConfig) -> None:
    """Hidden states gathered from a padded batch are those of each sequence alone."""
    model = tiny_llama()
    batch = RolloutBatch(
        prompts=[[3, 4, 5], [6]],
        tokens=torch.tensor([[7, 8, 0], [9, 10, 11]]),
        lengths=torch.tensor([2, 3]),
        finished_by_eos=torch.tensor([False, False]),
    )
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]])
    laid_out = sequences(batch, weights, torch.device("cpu"))
    alone = [
        model.model(torch.tensor([ids])).last_hidden_state[0, positions]
        for ids, positions in (([3, 4, 5, 7, 8], [2, 3]), ([6, 9, 10, 11], [1, 2]))
    ]
    torch.testing.assert_close(hidden_rows(model, laid_out), torch.cat(alone))
    assert laid_out.weights.tolist() == [1.0, 2.0, 3.0, 4.0]


BATCH = RolloutBatch(
    prompts=[[3]] * 3,
    tokens=torch.zeros(3, 6, dtype=torch.int64),
    lengths=torch.tensor([6, 4, 1]),
    finished_by_eos=torch.tensor([False, True, True]),
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["111111", "111100", "100000"]),
        ({"train_on_eos": False}, ["111111", "111000", "000000"]),
        ({"window_tokens": 2}, ["110000", "110000", "100000"]),
        ({"window_tokens": 2, "window": "last"}, ["000011", "001100", "100000"]),
        ({"window_tokens": 2, "window": "middle"}, ["001100", "011000", "100000"]),
        ({"window_tokens": 9, "window": "random"}, ["111111", "111100", "100000"]),
    ],
)
def test_windows(changes: dict[str, Any], expected: list[str]) -> None:
    weights = token_weights(BATCH, LossConfig(**changes), (0,))
    assert ["".join(str(int(w > 0)) for w in row) for row in weights] == expected


def test_random_windows_are_whole_and_follow_their_seed() -> None:
    config = LossConfig(window="random", window_tokens=2)
    draws = [token_weights(BATCH, config, (0, step)) > 0 for step in range(50)]
    assert torch.equal(draws[0], token_weights(BATCH, config, (0, 0)) > 0)
    starts = [int(draw[0].nonzero()[0]) for draw in draws]
    assert set(starts) == {0, 1, 2, 3, 4}
    for draw, start in zip(draws, starts, strict=True):
        assert draw[0, start : start + 2].all() and draw[0].sum() == 2


def test_denominators() -> None:
    token = token_weights(BATCH, LossConfig(), (0,))
    trajectory = token_weights(BATCH, LossConfig(denominator="trajectory"), (0,))
    fixed = token_weights(BATCH, LossConfig(denominator="fixed", fixed_length=10), (0,))
    assert token[token > 0].unique().tolist() == pytest.approx([1 / 11])
    assert trajectory[:, 0].tolist() == pytest.approx([1 / 18, 1 / 12, 1 / 3])
    assert fixed[fixed > 0].unique().tolist() == pytest.approx([1 / 30])


def test_a_batch_with_nothing_to_train_on_is_a_step_of_zero(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Every response is EOS alone, and EOS is not trained on."""
    config = make_config(steps=1, eval__every=0, loss__train_on_eos=False)
    trainer = build(config, tmp_path)
    trainer.rollout.eos_ids = list(range(32))
    trainer.run()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    assert row["loss"] == row["trained_tokens"] == row["grad_norm"] == 0


def test_prompts_depend_on_seed_and_step_alone() -> None:
    tokenized = TokenizedTask(load_task(DataConfig()), char_tokenizer(), DataConfig())
    a, b, c = (PromptStream(tokenized, 4, seed) for seed in (0, 0, 1))
    assert a.problems_for(3) == b.problems_for(3) != c.problems_for(3)
    assert a.problems_for(3) != a.problems_for(4)


def test_a_prompt_is_encoded_once() -> None:
    calls: list[str] = []
    tokenizer = char_tokenizer()

    def counting(text: str) -> Any:
        calls.append(text)
        return tokenizer(text)

    tokenized = TokenizedTask(load_task(DataConfig()), counting, DataConfig())
    stream = PromptStream(tokenized, 4, 0)
    first = stream.prompts_for(1)
    assert stream.prompts_for(1) == first == [list(tokenizer(t)["input_ids"]) for t in calls]
    assert len(calls) == 4


def test_a_task_of_chat_messages_needs_a_chat_template() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = None
    data = DataConfig(task="prompts")
    tokenized = TokenizedTask(load_task(data), tokenizer, data)
    with pytest.raises(ConfigError, match="data.task: .*need a chat template"):
        PromptStream(tokenized, 1, 0).prompts_for(1)


def test_an_epoch_uses_every_prompt_once(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{i}\n" for i in range(100, 120)))
    tokenized = TokenizedTask(
        load_task(DataConfig(task=f"prompts:{path}")), char_tokenizer(), DataConfig()
    )
    stream = PromptStream(tokenized, 3, 0)
    size = len(stream.problems)
    assert 3 < size < 20
    seen = [p.prompt for step in range(1, size + 1) for p in stream.problems_for(step)]
    epochs = [seen[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] and len(set(epochs[0])) == size


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(make_config(steps=5, eval__every=0), tmp_path, save=True)
    real, weights = trainer._gradient, {}

    def broken(step: int, *rest: Any) -> dict[str, float]:
        sums = real(step, *rest)
        weights.update({k: v.clone() for k, v in trainer.student.state_dict().items()})
        return {**sums, "loss": float("nan")} if step == 3 else sums

    monkeypatch.setattr(trainer, "_gradient", broken)
    with pytest.raises(TrainingError, match="step 3: loss nan.*those of step 2"):
        trainer.run()
    assert len(losses(tmp_path)) == 2
    directory = tmp_path / "checkpoints"
    assert checkpoint.latest(directory) == directory / "step_000002"
    assert all(torch.equal(v, trainer.student.state_dict()[k]) for k, v in weights.items())


def test_a_prompt_that_does_not_fit_is_refused_before_training(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ContextError, match="context overflow: the longest prompt has 12 tokens"):
        build(make_config(rollout__max_new_tokens=117, eval__every=0), tmp_path)
    assert not any(tmp_path.iterdir())


def test_learning_rate_warms_up_and_decays() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(optim, step, 8) for step in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = optim.model_copy(update={"schedule": "cosine"})
    rates = [learning_rate(cosine, step, 8) for step in range(4, 9)]
    assert rates[0] == rates[1] == 1.0 and 0 < rates[-1] < 0.2
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_spans_add_seconds_and_keep_the_peak() -> None:
    if PeakMemory().bytes() is None:
        pytest.skip("the resident high-water mark cannot be reset here")
    spans = Spans()
    for megabytes in (8, 200, 8):
        with spans("work"):
            block = torch.ones(megabytes << 18)
            del block
    with spans("rest"):
        pass
    work, rest = spans.peak_bytes["work"], spans.peak_bytes["rest"]
    assert work is not None and rest is not None
    assert 150 << 20 < work - rest < 400 << 20
    assert spans.seconds["work"] > spans.seconds["rest"] > 0


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "los')
    assert read_rows(path) == [{"step": 1}]
