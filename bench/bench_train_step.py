"""A whole step of on-policy distillation: ours, ours inside TRL, and TRL as it is, on the CPU.

    make bench        or   python -m pytest bench/bench_train_step.py -s

Two pairs with random weights, fp32: a tiny one with SmolLM2's vocabulary, and one of the widths of
SmolLM2-135M with 12 of its 30 layers, student and teacher. A step samples 2 answers to each of 2
prompts of 33 tokens, 8 tokens each (a short rollout, as of ESR) or 32 (a full one), scores them
with the teacher, and updates all weights with AdamW. Every trainer runs in a process of its own, on
one thread, and all take their turns step by step. Seconds are those of the processor, so that what
else the machine does is not in them but for its effect on caches. No row is padding and no answer
ends early: a batch that has both gains more. Written to bench/results/ as JSON lines.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.bench_rollout import SHAPE
from bench.measure import MIB, record
from bench.train_step import PHASES, SAMPLES
from tests.tiny import ALPHABET, char_tokenizer

TRAINERS = {
    "esr_train": "esr_train",
    "subclass": "TRL, our subclass and rollouts",
    "patched": "TRL, patched",
    "trl": "TRL as it is",
}
PROMPTS, PROMPT_LENGTH = 2, 32
KINDS = {"ESR, 8 tokens": 8, "full, 32 tokens": 32}
ROUNDS = int(os.environ.get("ESR_BENCH_ROUNDS", "2"))
# Changes of SmolLM2's shape, of the student and of the teacher.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny pair, hidden 128 and 192, 2 layers": (
        {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
        {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2},
    ),
    "SmolLM2-135M's widths, 12 layers, both": ({"num_hidden_layers": 12},) * 2,
}
_HEADS = {128: (4, 2), 192: (6, 2), 288: (9, 3), 576: (9, 3)}


def _save(directory: Path, seed: int, changes: dict[str, Any]) -> None:
    shape = {**SHAPE, **changes, "eos_token_id": 0, "pad_token_id": 0}
    heads = dict(
        zip(
            ("num_attention_heads", "num_key_value_heads"),
            _HEADS[shape["hidden_size"]],
            strict=True,
        )
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**shape, **heads})).save_pretrained(directory)
    char_tokenizer().save_pretrained(directory)


def save_pair(directory: Path, student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """What `bench.train_step` reads: two models, as changes of SmolLM2's shape, and prompts."""
    _save(directory / "student", 0, student)
    _save(directory / "teacher", 1, teacher)
    letters = random.Random(0)
    lines = ["".join(letters.choices(ALPHABET[:20], k=PROMPT_LENGTH)) for _ in range(PROMPTS)]
    (directory / "prompts.txt").write_text("\n".join(lines))


class Process:
    """A trainer that makes a step when it is told to."""

    def __init__(self, name: str, directory: Path) -> None:
        command = [sys.executable, "-m", "bench.train_step", name, str(directory)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.log = (directory / f"{name}.log").open("w+")
        self.process = subprocess.Popen(command, stderr=self.log, text=True, bufsize=1, **pipes)

    def line(self) -> str:
        """The next line that is ours; the trainers print some of their own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n" or line.startswith('{"rollout"'):
                return line
        self.log.seek(0)
        raise RuntimeError(self.log.read()[-2000:])

    def step(self, length: int) -> dict[str, float]:
        assert self.process.stdin is not None
        print(length, file=self.process.stdin, flush=True)
        return json.loads(self.line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()
        self.log.close()


def _measured(directory: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Steps by kind and trainer; the first of each kind, which warms up, is not among them."""
    processes = {name: Process(name, directory) for name in TRAINERS}
    try:
        for process in processes.values():
            process.line()
        steps: Any = {kind: {name: [] for name in TRAINERS} for kind in KINDS}
        for round_number in range(ROUNDS + 1):
            for kind, length in KINDS.items():
                for name, process in processes.items():
                    step = process.step(length)
                    if round_number:
                        steps[kind][name].append(step)
        return steps
    finally:
        for process in processes.values():
            process.close()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what the record says; the processes have one each
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("pair", PAIRS)
def test_a_whole_step(pair: str, tmp_path: Path) -> None:
    save_pair(tmp_path, *PAIRS[pair])
    for kind, steps in _measured(tmp_path).items():
        table = {TRAINERS[name]: _row(rows, steps["trl"]) for name, rows in steps.items()}
        title = f"{pair}, {PROMPTS} prompts x {SAMPLES} answers, {kind}"
        _report(title, table)
        # The same pairs, prompts and lengths: TRL patched has TRL's own random numbers besides.
        assert table["TRL, patched"]["loss"] == pytest.approx(
            table["TRL as it is"]["loss"], rel=1e-4
        )
        assert table["esr_train"]["loss"] == pytest.approx(table["TRL as it is"]["loss"], rel=0.3)
        # In the committed record 0.50 to 0.85 with full responses, 0.77 to 0.99 with short ones.
        for name, row in table.items():
            assert row["over_trl"] <= (1.0 if kind.startswith("full") else 1.1), (name, kind)


def _row(steps: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: statistics.median(step[name] for step in steps)
        for name in (*PHASES, "step", "wall", "loss")
    }
    row["over_trl"] = statistics.median(
        own["step"] / its["step"] for own, its in zip(steps, base, strict=True)
    )
    peaks = [step["peak"] for step in steps if step["peak"] is not None]
    row["peak_mib"] = max(peaks) / MIB if peaks else None
    return row


def _report(title: str, table: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}, fp32, 1 thread, {ROUNDS} rounds, processor seconds")
    print(f"{'':<32}" + "".join(f"{name:>11}" for name in (*PHASES, "step", "x TRL", "MiB")))
    for name, row in table.items():
        cells = [row[phase] for phase in (*PHASES, "step", "over_trl")]
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(f"{name:<32}" + "".join(f"{cell:>11.2f}" for cell in cells) + f"{memory:>11}")
    record("train_step_cpu", title, ROUNDS, table)
