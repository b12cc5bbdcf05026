"""Build a teacher and a student of reasoning-gym's mini_sudoku, with no planted mode.

    python -m tools.build_sudoku --out configs/sudoku     # writes teacher, student, card.json

Both are Llama models of one size that learn by cross-entropy from the package's own questions and
answers, from different seeds; the student for fewer steps. What is wrong with it is what it has not
learned yet. The tokenizer has one id for a character and one for each piece of text that all
questions share. Weights are written in bf16; accuracies are those of the files as written.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from esr_train.metrics import cpu_name
from esr_train.rollout import PrefixRollout
from esr_train.tasks.gym import GymTask
from tools import build_sums

IGNORED = -100  # label of prompt and padding positions
TASK = "mini_sudoku"
ALPHABET = "1234_ \n"
# The rules before a puzzle and the format after it, the same in all questions: one id each.
PIECES = (
    "In 4x4 Mini Sudoku:\n- Each row must contain each number from 1-4 exactly once\n- Each column "
    "must contain each number 1-4 exactly once\n- Each 2x2 subgrid must contain each number 1-4 "
    "exactly once\nSolve this 4x4 Mini Sudoku puzzle:\n",
    "\nFormat your response as the puzzle above, with spaces separating each number within a row, "
    "and newlines separating rows.\n",
)
LONGEST = 34  # tokens of an answer that are sampled; a right one has 32 with its end


@dataclass(frozen=True)
class Recipe:
    """One model and its training."""

    name: str
    steps: int
    seed: int
    lr: float = 1.5e-3
    batch: int = 64
    warmup: int = 50


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per character and per shared piece; encoding puts <bos> in front."""
    return build_sums.build_tokenizer(ALPHABET, PIECES)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of 0.66 million parameters."""
    return build_sums.build_model(tokenizer, heads=4, intermediate=256)


def train(
    model: LlamaForCausalLM, problems: tuple[torch.Tensor, torch.Tensor], recipe: Recipe
) -> None:
    """AdamW with warm-up and cosine decay on the answer tokens and the end token."""
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, betas=(0.9, 0.98))
    started = time.perf_counter()
    draws = torch.Generator().manual_seed(recipe.seed)
    for step in range(1, recipe.steps + 1):
        chosen = torch.randint(len(problems[0]), (recipe.batch,), generator=draws)
        ids, labels = (part[chosen] for part in problems)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - 1) / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / recipe.warmup) * decay
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == recipe.steps:
            seconds = time.perf_counter() - started
            done = f"{recipe.name}  step {step}/{recipe.steps}"
            print(f"{done}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def solved(model: Any, tokenizer: Any, temperature: float, count: int = 128) -> float:
    """The share of `count` held-out puzzles whose answer is right in all places."""
    task = GymTask(TASK)
    problems = task.problems("heldout", count, 7)
    prompts = [list(tokenizer(str(problem.prompt)).input_ids) for problem in problems]
    key = ("build_sudoku", "solved")
    batch = PrefixRollout(model, tokenizer).generate(prompts, 1, LONGEST, temperature, key)
    texts = [
        tokenizer.decode(batch.response(row), skip_special_tokens=True) for row in range(count)
    ]
    scores = [
        task.score(problem, text)["solved"] for problem, text in zip(problems, texts, strict=True)
    ]
    return sum(scores) / count


def load(tokenizer: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) of `count` training problems, int64 [count, length]; labels are IGNORED off the
    answer. All questions and all answers have one length."""
    ids, labels = [], []
    for problem in GymTask(TASK).problems("train", count, 0):
        prompt = tokenizer(str(problem.prompt)).input_ids
        answer = tokenizer(str(problem.answer), add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        ids.append(prompt + answer)
        labels.append([IGNORED] * len(prompt) + answer)
    return torch.tensor(ids), torch.tensor(labels)


def main(arguments: list[str] | None = None) -> int:
    """Build and save both models, and what they are like; the exit status."""
    parser = argparse.ArgumentParser(description="Build the pair of docs/sudoku.md.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--student-steps", type=int, default=150)
    parser.add_argument("--problems", type=int, default=6000, help="to train on")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    card: dict[str, Any] = {}
    tokenizer = build_tokenizer()
    problems = load(tokenizer, options.problems)
    for recipe in (
        Recipe("student", options.student_steps, seed=1),
        Recipe("teacher", options.teacher_steps, seed=0),
    ):
        started = time.perf_counter()
        torch.manual_seed(recipe.seed)
        model = build_model(tokenizer)
        train(model, problems, recipe)
        model.eval().to(torch.bfloat16).save_pretrained(options.out / recipe.name)
        tokenizer.save_pretrained(options.out / recipe.name)
        model.float()  # of the rounded weights
        found = {
            kind: round(solved(model, tokenizer, temperature), 4)
            for kind, temperature in (("greedy", 0.0), ("sampled", 1.0))
        }
        minutes = round((time.perf_counter() - started) / 60, 1)
        card[recipe.name] = {**asdict(recipe), "solved": found, "minutes": minutes}
        print(f"{recipe.name}  {found}", flush=True)
    card |= {
        "task": TASK,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": options.threads,
        "platform": platform.platform(),
    }
    (options.out / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
