"""Run directories for the tests of results, headline and report, without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from esr_train.report.headline import headline
from esr_train.report.results import Run, read_run
from esr_train.report.summary import ArmSummary, summarise
from esr_train.report.tuning import settings_of

MIB = 2**20


def write_config(folder: Path, lengths: dict[str, int], seeds: int = 1, **changes: Any) -> None:
    """config.yaml and environment.json of a run with {arm: max_new_tokens}."""
    config: dict[str, Any] = {
        "student": {"model": "a"},
        "teacher": {"model": "b"},
        "rollout": {"max_new_tokens": 100},
        "report": {"metric": "greedy_accuracy", "threshold": 0.9},
        "steps": 20,
        "seeds": list(range(seeds)),
        "arms": [{"name": name, "max_new_tokens": length} for name, length in lengths.items()],
    }
    if "full" in lengths:
        config["report"]["baseline"] = "full"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes), encoding="utf-8")
    environment = {"cpu": "8-core test CPU", "torch": "2.13", "threads": 2, "commit": "abc123"}
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")


def write_seed(
    folder: Path,
    arm: str,
    seed: int,
    evals: list[tuple[float, float, float, float | None]],
    *,
    step_seconds: float = 1.0,
    peak: int | None = 100 * MIB,
    tokens: int = 100,
    samples: list[dict[str, Any]] | None = None,
    extra: Callable[[float], dict[str, float]] = lambda step: {},
) -> Path:
    """Logs of a seed; evals are (step, train_seconds, tokens, greedy_accuracy)."""
    target = folder / "arms" / arm / f"seed{seed}"
    target.mkdir(parents=True, exist_ok=True)
    shares = {"rollout": 0.7, "teacher": 0.1, "student": 0.2}
    peaks = {"rollout": 0.5, "teacher": 0.7, "student": 1.0}
    metrics = [
        {
            "step": step,
            "divergence": 2.0 * math.exp(-step / 8)
            + 20 / tokens
            + 0.05 * math.sin(9 * step + seed),
            "response_length": tokens / 64 * (0.9 + 0.1 * math.cos(step + seed)),
            "eos_rate": min(1.0, tokens / 2e4 + step / 400),
            "tokens": tokens,
            "seconds": {name: share * step_seconds for name, share in shares.items()},
            "peak_bytes": {k: None if peak is None else int(v * peak) for k, v in peaks.items()},
        }
        for step in range(1, int(evals[-1][0]) + 1 if evals else 4)
    ]
    rows = [
        {
            "step": step,
            "train_seconds": seconds,
            "tokens": count,
            "metrics": {"greedy_accuracy": value, **extra(step)},
        }
        for step, seconds, count, value in evals
    ]
    write_rows(target / "metrics.jsonl", metrics)
    write_rows(target / "evals.jsonl", rows)
    write_rows(target / "samples.jsonl", samples or [])
    return target


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_arms(folder: Path, evals: dict[str, list[tuple[Any, ...]]], **how: Any) -> Run:
    """A run with one seed an arm, from evaluations as `write_seed` takes them."""
    write_config(folder, {name: 100 if name == "full" else 10 for name in evals})
    for name, rows in evals.items():
        write_seed(folder, name, 0, [(0, 0, 0, 0.1), *rows], **how)
    return read_run(folder)


def by_hand(folder: Path, **changes: Any) -> Run:
    """Three seeds of two arms of a language model, small enough to do in one's head."""
    known = {"data": {"task": "prompts"}, **changes}
    write_config(folder, {"full": 100, "esr-10": 10}, seeds=3, **known)
    for seed, late in enumerate([40.0, 60.0, 80.0]):
        evals = [(0, 0, 0, 0.1), (10, late / 2, 1000, 0.8), (20, late, 2000, 0.9 + seed / 10)]
        write_seed(folder, "full", seed, evals, step_seconds=2.0, peak=300 * MIB, tokens=100)
    for seed, late in enumerate([10.0, 20.0, 16.0]):
        evals = [(0, 0, 0, 0.1), (10, late / 2, 100, 0.9 if seed == 2 else 0.5)]
        evals.append((20, late, 200, 0.9 if seed < 2 else 0.85))
        write_seed(folder, "esr-10", seed, evals, step_seconds=0.5, peak=200 * MIB, tokens=10)
    return read_run(folder)


def with_mask_only(folder: Path) -> Run:
    """The run of `by_hand` with a third arm: full rollouts, the loss on the first 10 tokens."""
    arms = [{"name": "full"}, {"name": "esr-10", "max_new_tokens": 10}]
    arms.append({"name": "mask-10", "loss.window_tokens": 10})
    report = {"metric": "greedy_accuracy", "threshold": 0.9, "baseline": "full"}
    run = by_hand(folder, arms=arms, report=report)
    for seed in range(3):
        write_seed(folder, "mask-10", seed, [(0, 0, 0, 0.1), (10, 80, 1000, 0.9)])
    return run


def tune_as_it_is(folder: Path, seeds: tuple[int, ...] = (1000, 1001)) -> Run:
    """Write a tuning.json that chooses the rates that the arms of a run have."""
    arms = {}
    for arm in read_run(folder).arms:
        rate, settings = arm.config.optim.lr, settings_of(arm.config)
        each = {"rate": rate, "ends": [0.8, 0.9], "end": 0.85, "mean": 0.5, "gain": 0.8}
        other = {**each, "rate": 3 * rate, "kept": None, "unstable": "ends below its start"}
        rates = [{**each, "kept": 1.0, "unstable": None}, other]
        note = "the lowest rate of the grid: others may be better"
        arms[arm.name] = {"chosen": rate, "note": note, "rates": rates, "settings": settings}
    text = json.dumps({"rule": "the best", "seeds": seeds, "arms": arms})
    (folder / "tuning.json").write_text(text, encoding="utf-8")
    return read_run(folder)


def set_baseline(folder: Path, name: str | None) -> None:
    """Name another arm of a run that is written already."""
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["report"]["baseline"] = name
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def headline_of(run: Run) -> str:
    return headline(run, summarise(run))


def summaries_of(run: Run) -> dict[str, ArmSummary]:
    return {item.name: item for item in summarise(run)}


def realistic(folder: Path, seeds: int = 3) -> None:
    """A run with noisy curves, as a comparison writes it; also what the figures are judged by."""
    lengths = {"full": 256, "esr-16": 16, "esr-64": 64, "esr-8": 8}
    write_config(folder, lengths, seeds=seeds, steps=60)
    for name, length in lengths.items():
        for seed in range(seeds):
            noise = np.random.default_rng([length, seed])
            ceiling = {8: 0.62, 16: 0.95, 64: 0.99, 256: 0.99}[length]
            evals, seconds = [], 0.1 + 0.011 * length
            for step in range(0, 61, 5):
                gain = 1 - math.exp(-step / (10 + 6 * noise.random()))
                value = 0.07 + (ceiling - 0.07) * gain
                value -= 0.006 * max(0, step - 30) * (length == 8)
                evals.append((step, step * seconds, step * 64 * length, round(value, 3)))
            write_seed(
                folder, name, seed, evals, step_seconds=seconds * (1 + 0.05 * seed),
                peak=int((400 + 2.5 * length) * MIB), tokens=64 * length,
                samples=[
                    {"step": s, "prompt": "12+34+56+78=", "response": f"12+34=46;{s}", "score": 1.0}
                    for s in (0, 30, 60)
                ],
                extra=lambda step: {"sampled_accuracy": step / 70, "heldout_kl": 2 / (1 + step)},
            )  # fmt: skip
