"""Build the students of docs/fork.md: where student and teacher part, the fork, is moved.

    python -m tools.build_fork --out configs/fork           # all of them, minutes on one core
    python -m tools.build_fork --out configs/fork --only fork-40

The teacher is builtin:sums-teacher, which adds step by step. These students begin as it does and
leave it at a known place of the answer, to guess in many words (tasks/sums.py):

    fork-40    after the first of three partial sums, 43 to 48 characters into the answer
    fork-120   after the tens of the third, 111 to 126 characters into it
    no-fork    nowhere: the teacher with noise on its weights, which errs anywhere

The built-in student has its fork at 0. fork-40 starts from the teacher, as the built-in student
did, and fork-120 from fork-40, since the words take longer to learn than the place. Weights are
written in bf16. Accuracies are those of the files as written; exits with status 1 if one misses its
target.
"""

from __future__ import annotations

import argparse
import random
import sys
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from esr_train.tasks import builtin_model_path
from esr_train.tasks.sums import SumsTask, step_by_step, wordy_guess
from tools.build_sums import Recipe, accuracy, build_tokenizer, train


def abandoned(summands: list[int], rng: random.Random, after: str) -> str:
    """Steps up to a fork, then a guess: `after` is "first sum" or "last tens"."""
    text = step_by_step(summands)
    if after == "first sum":
        end = text.index(". ") + 2
    else:
        end = text.index(", ", text.rindex(". then ")) + 2
    return text[:end] + wordy_guess(summands, rng, length=(160 - end, 220 - end))


NOISE = 0.3  # of no-fork: standard deviation, of that of each matrix
RECIPES = (
    Recipe(
        *("fork-40", "teacher", 300, 0.62, 1e-3),
        greedy=(0.0, 0.25),
        sampled=(0.2, 0.55),
        guess=partial(abandoned, after="first sum"),
    ),
    Recipe(
        *("fork-120", "fork-40", 80, 0.62, 1e-3),
        batch=16,
        greedy=(0.0, 0.25),
        sampled=(0.2, 0.55),
        guess=partial(abandoned, after="last tens"),
    ),
    Recipe("no-fork", "teacher", 0, 0.0, 0.0, greedy=(0.1, 0.7), sampled=(0.0, 0.6)),
)


@torch.no_grad()
def disturb(model: LlamaForCausalLM) -> None:
    """Add Gaussian noise to every matrix, in proportion to the spread of its elements."""
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.add_(NOISE * weight.std() * torch.randn_like(weight))


def main(arguments: list[str] | None = None) -> int:
    """Build, save and check the students; the exit status."""
    parser = argparse.ArgumentParser(description="Build the students with a moved fork.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--only", choices=[r.name for r in RECIPES], help="build one of them")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    problems = SumsTask().problems("heldout", 128, options.seed)
    missed = False
    for recipe in RECIPES:
        if options.only not in (None, recipe.name):
            continue
        torch.manual_seed(options.seed)
        tokenizer = build_tokenizer()
        origin = builtin_model_path("sums-teacher")
        if recipe.starts_from != "teacher":
            origin = options.out / str(recipe.starts_from)
        model = LlamaForCausalLM.from_pretrained(origin, dtype=torch.float32)
        if recipe.steps:
            train(model, tokenizer, recipe, options.seed)
        else:
            disturb(model)
        model.eval().to(torch.bfloat16).save_pretrained(options.out / recipe.name)
        tokenizer.save_pretrained(options.out / recipe.name)
        model.float()  # of the rounded weights
        for kind, temperature, (low, high) in (
            ("greedy", 0.0, recipe.greedy),
            ("sampled", 1.0, recipe.sampled),
        ):
            value = accuracy(model, tokenizer, problems, temperature)
            print(f"{recipe.name}  {kind} accuracy {value:.3f}  target {low:.2f} to {high:.2f}")
            missed |= not low <= value <= high
    if missed:
        print("error: an accuracy lies outside its target", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
