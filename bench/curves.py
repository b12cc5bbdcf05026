"""Time and memory against tokens, vocabulary and the length of responses, on the CPU.

    python -m bench.curves                     # measures all three and draws them: minutes
    python -m bench.curves response            # one of tokens, vocabulary, response
    python -m bench.curves --draw              # draws the newest records again

`tokens` and `vocabulary` measure reverse KL with a trained head, forward and backward, fp32: ours
by the plan that "auto" takes, by a stash, and by a recompute within a budget, beside plain PyTorch,
TRL and Liger. `response` measures a whole training step, ours and TRL's, on a pair of half of
SmolLM2-135M's width. Contenders take turns, round after round. With `--threads 1` and in `response`
seconds are the processor's, so that they hold on a busy machine too. Records go to
bench/results/curves_cpu.jsonl, figures to docs/curves/, tables to docs/curves.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import readme
from bench.bench_train_step import Process, save_pair
from bench.curve_figures import draw
from bench.loss_costs import loss_costs
from bench.measure import MIB, record
from bench.peers import Contender, make_operands, ours, peers
from esr_kernels import plan_linear_divergence

WIDTH = 256  # of the hidden states of both models
TOKENS, AT_VOCABULARY = (64, 128, 256, 512, 1024, 2048), 49_152
VOCABULARIES, AT_TOKENS = (8_192, 16_384, 32_768, 49_152, 98_304, 151_936), 128
LENGTHS = (16, 32, 64, 128, 256)
BUDGET = 64 * 10**6  # bytes, of the recompute
ROUNDS = 3  # and one less from so many logits of a model on
MANY = 2**25
BASE = "plain PyTorch"
HALF = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6}
TRAINERS = {"esr_train": "esr_train", "TRL": "trl"}

Table = dict[str, dict[str, dict[str, Any]]]


def contenders() -> dict[str, Contender]:
    """Ours by three plans and the peers that are installed. torch.compile compiles for each size
    and is left to bench_linear_divergence.py, as is what Liger makes of it."""
    found = {
        "ours, auto": ours("auto"),
        "ours, stash": ours("stash"),
        f"ours, recompute in {BUDGET // 10**6} MB": ours("recompute", BUDGET),
    }
    for name, make in peers().items():
        if "compile" not in name:
            found[name] = make()
    return found


def at_size(tokens: int, classes: int, rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Seconds, their ratio to plain PyTorch's and memory of each contender."""
    x = make_operands(tokens, WIDTH, WIDTH, classes)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    costs = loss_costs(x, contenders(), rounds - (tokens * classes >= MANY), clock=clock)
    costs.check_losses(BASE, {})
    table: dict[str, dict[str, Any]] = {
        name: {
            "seconds": costs.median(name),
            "over_plain": costs.ratio(name, BASE),
            "extra_mib": costs.extra_mib[name],
        }
        for name in costs.seconds
    }
    plan = plan_linear_divergence(tokens, classes, WIDTH, WIDTH, dtype=torch.float32, device="cpu")
    table["ours, auto"]["plan"] = plan.kind
    return table


def by_tokens() -> Table:
    return {str(size): at_size(size, AT_VOCABULARY) for size in TOKENS}


def by_vocabulary() -> Table:
    return {str(size): at_size(AT_TOKENS, size) for size in VOCABULARIES}


def by_response(
    lengths: Sequence[int] = LENGTHS, rounds: int = ROUNDS, shape: dict[str, Any] = HALF
) -> Table:
    """Processor seconds of a step over those of TRL's at the longest, and the process's peak."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        save_pair(Path(name), shape, shape)
        processes: dict[str, Process] = {}
        for label, trainer in TRAINERS.items():
            processes[label] = process = Process(trainer, Path(name))
            stack.callback(process.close)
        for process in processes.values():
            process.line()
            process.step(lengths[0])  # warms up
        steps: dict[tuple[int, str], list[dict[str, float]]] = {}
        for _ in range(rounds):
            for length in lengths:
                for label, process in processes.items():
                    steps.setdefault((length, label), []).append(process.step(length))
    full = steps[lengths[-1], "TRL"]
    return {
        str(length): {
            label: {
                "seconds": statistics.median(step["step"] for step in steps[length, label]),
                "over_full": statistics.median(
                    step["step"] / base["step"]
                    for step, base in zip(steps[length, label], full, strict=True)
                ),
                "rollout_seconds": statistics.median(
                    step["rollout"] for step in steps[length, label]
                ),
                "peak_mib": _peak_mib(steps[length, label]),
            }
            for label in processes
        }
        for length in lengths
    }


def _peak_mib(steps: list[dict[str, float]]) -> float | None:
    peaks = [step["peak"] for step in steps]
    return None if None in peaks else max(peaks) / MIB


CURVES: dict[str, tuple[str, Callable[[], Table]]] = {
    "tokens": (f"tokens, V={AT_VOCABULARY}, Ds=Dt={WIDTH}", by_tokens),
    "vocabulary": (f"vocabulary, T={AT_TOKENS}, Ds=Dt={WIDTH}", by_vocabulary),
    "response": (
        "response tokens, a whole step, 2 prompts x 2 answers, hidden 288, 6 layers, V=49152",
        by_response,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.curves", description=__doc__)
    parser.add_argument("curves", nargs="*", help=f"of {', '.join(CURVES)}; default all")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    for name in given.curves:
        if name not in CURVES:
            parser.error(f"unknown curve {name!r}; one of {', '.join(CURVES)}")
    for name in [] if given.draw else given.curves or CURVES:
        problem, measure = CURVES[name]
        load = os.getloadavg()[0]
        print(f"{problem} ...", flush=True)
        # Of a step the processes have one each, and the record says so.
        torch.set_num_threads(1 if name == "response" else given.threads)
        table = measure()
        record("curves_cpu", problem, ROUNDS, table, curve=name, load_before=load)
        for size, row in table.items():
            shown = ", ".join(f"{who} {costs['seconds']:.3f}" for who, costs in row.items())
            print(f"{size}: {shown}", flush=True)
    draw()
    readme.main()


if __name__ == "__main__":
    main()
