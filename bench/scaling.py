"""Memory and time of a training step for pairs of models on 1, 8 and 64 GPUs: predicted, on paper.

    python -m bench.scaling            # writes docs/scaling.md and bench/results/scaling.json
    python -m bench.scaling --check    # exit 1 where they are out of date

`esr_train.estimate` gives what one GPU does with its share of the batch; this adds what fully
sharded data parallelism keeps and sends. docs/scaling.md states every formula, and which two rates
have been compared with a run on a GPU.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from esr_train.config import Config
from esr_train.estimate import (
    BANDWIDTH_SHARE,
    COMPUTE_SHARE,
    HARDWARE,
    Plan,
    largest_micro_batch,
    memory,
    step_seconds,
    trained_tokens,
)
from esr_train.models import decoder
from esr_train.rollout.decoder import token_bytes
from esr_train.vocabulary import Vocabulary

ROOT = Path(__file__).parent.parent
DEVICE = "h100"
GPUS, NODE = (1, 8, 64), 8
RESPONSES, SAMPLES, PROMPT = 512, 8, 256
LENGTHS = {"ESR": 100, "full": 2048}
MICRO_BATCH_TOKENS = 16384  # of a forward and backward pass on one GPU
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and GPU, each way: NVLink 4; 400 Gb/s a GPU
LINK_SHARE = 0.7

QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768}
LLAMA = {"vocab_size": 128256, "max_position_embeddings": 131072}
# As the models' public configuration files state them.
MODELS: dict[str, Any] = {
    "Qwen2.5-0.5B": lambda: Qwen2Config(
        **QWEN,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": lambda: Qwen2Config(
        **QWEN,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Qwen3-1.7B": lambda: _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-8B": lambda: _qwen3(4096, 12288, 36, 32, False),
    "Qwen3-32B": lambda: _qwen3(5120, 25600, 64, 64, False),
    "Llama-3.1-8B": lambda: _llama(4096, 14336, 32, 32),
    "Llama-3.3-70B": lambda: _llama(8192, 28672, 80, 64),
}
PAIRS = (
    ("Qwen2.5-0.5B", "Qwen2.5-1.5B"),
    ("Qwen3-1.7B", "Qwen3-8B"),
    ("Qwen3-8B", "Qwen3-32B"),
    ("Llama-3.1-8B", "Llama-3.3-70B"),
    ("Llama-3.3-70B", "Llama-3.3-70B"),
)


@dataclass(frozen=True)
class Row:
    """One predicted step of one GPU; bytes and seconds."""

    student: str
    teacher: str
    gpus: int
    shards: int  # GPUs over which weights are sharded; groups of them are replicas
    arm: str
    length: int  # tokens of a response
    resident: int  # shards of weights, masters, moments and gradients
    peak: int
    fits: bool
    rollout: float
    teacher_pass: float
    student_pass: float
    received: float  # bytes that a GPU receives a step
    exposed: float  # seconds of it that no computation hides
    loss_share: float  # of all seconds
    logits: int  # bytes of the plain loss's logits and gradients for a micro-batch; fp32
    loss_bytes: int  # of ours

    @property
    def seconds(self) -> float:
        return self.rollout + self.teacher_pass + self.student_pass + self.exposed


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        **QWEN,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def _llama(hidden: int, inner: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        **LLAMA,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


def on_meta(name: str) -> Any:
    """A model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.bfloat16).eval()


def share_of_one(gpus: int, length: int, in_flight: int) -> Config:
    """What one of `gpus` GPUs does: its share of the responses, full fine-tuning."""
    prompts = RESPONSES // SAMPLES // gpus
    return Config.model_validate(
        {
            "student": {"model": "-"},
            "teacher": {"model": "-"},
            "rollout": {
                "prompts": prompts,
                "samples": SAMPLES,
                "max_new_tokens": length,
                "max_tokens_in_flight": max(in_flight, PROMPT + length),
            },
            "optim": {"lr": 1e-6, "max_tokens": MICRO_BATCH_TOKENS},
            "runtime": {"gradient_checkpointing": True},
            "eval": {"every": 0},
            "steps": 1,
        }
    )


def predict(pair: tuple[str, str], models: tuple[Any, Any], gpus: int, arm: str) -> Row:
    """The row of a pair, a number of GPUs and an arm."""
    length, hardware = LENGTHS[arm], HARDWARE[DEVICE]
    student, teacher = models
    plan = Plan(
        student, teacher, False, Vocabulary(student.config.vocab_size), DEVICE, PROMPT, True
    )
    bytes_of = [sum(p.nbytes for p in model.parameters()) for model in models]
    count = sum(p.numel() for p in student.parameters())
    heads = [head.nbytes for head in plan.heads()]
    # Outside the layers: embeddings, and a head of its own where the two are not tied.
    roots = [
        head * (1 if model.config.tie_word_embeddings else 2)
        for head, model in zip(heads, models, strict=True)
    ]
    layer = [
        (total - root) // model.config.num_hidden_layers
        for total, root, model in zip(bytes_of, roots, models, strict=True)
    ]
    # The smallest group of GPUs, one or whole nodes, over which the weights fit.
    for shards in (size for size in GPUS if size <= gpus):
        if shards > 1:
            # FSDP2 keeps fp32 shards of what is trained: a 16-bit copy exists while it is gathered.
            resident = (16 * count + bytes_of[1]) // shards
            # The layer in use and the next, of both models; embeddings and heads; the fp32
            # gradient of the student's before it is reduced.
            gathered = 3 * roots[0] + 2 * layer[0] + roots[1] + 2 * layer[1]
            sampling = bytes_of[0]
        else:
            resident, gathered, sampling = 16 * count + sum(bytes_of), 0, 0
        free = int(hardware.memory) - resident - sampling
        in_flight = max(1, free // 2 // token_bytes(decoder(student)))
        config = share_of_one(gpus, length, in_flight)
        kinds = memory(config, plan)
        training = gathered + kinds.activations + kinds.loss
        peak = resident + max(training, sampling + kinds.keys_values)
        fits = peak <= hardware.memory and free > 0
        if fits:
            break

    passes = math.ceil(RESPONSES // gpus / largest_micro_batch(config, plan))
    seconds = step_seconds(config, plan)
    optimizer = 28 * count / (BANDWIDTH_SHARE * hardware.bandwidth)
    seconds["student"] -= optimizer * (1 - 1 / shards)
    # For the rollout once; forward of the teacher; forward, backward and fp32 gradients.
    received = {
        "rollout": bytes_of[0],
        "teacher": passes * bytes_of[1],
        "student": passes * 2 * bytes_of[0] + passes * 4 * count,
    }
    rate = LINK_SHARE * (NVLINK if shards <= NODE else NETWORK)
    exposed = 0.0
    for phase, size in received.items():
        received[phase] = size * (shards - 1) / shards
        # Gathering before a rollout overlaps with nothing; the rest with the pass it belongs to.
        hidden = 0.0 if phase == "rollout" else seconds[phase]
        exposed += max(0.0, received[phase] / rate - hidden)
    if gpus > shards:
        # One sum of gradients over the groups a step, after the last pass.
        groups = gpus // shards
        received["replicas"] = 2 * (groups - 1) / groups * 4 * count / shards
        exposed += received["replicas"] / (LINK_SHARE * NETWORK)

    tokens = RESPONSES // gpus * trained_tokens(config)
    parameters = [head // 2 for head in heads]
    loss = (6 * parameters[0] + 2 * parameters[1]) * tokens / (COMPUTE_SHARE * hardware.flops)
    rows = largest_micro_batch(config, plan) * trained_tokens(config)
    return Row(
        *pair,
        gpus=gpus,
        shards=shards,
        arm=arm,
        length=length,
        resident=resident,
        peak=peak,
        fits=fits,
        rollout=seconds["rollout"],
        teacher_pass=seconds["teacher"],
        student_pass=seconds["student"],
        received=sum(received.values()),
        exposed=exposed,
        loss_share=loss / (sum(seconds.values()) + exposed),
        logits=6 * 4 * rows * student.config.vocab_size,
        loss_bytes=kinds.loss,
    )


def all_rows() -> list[Row]:
    """Every pair, number of GPUs and arm."""
    made = {name: on_meta(name) for name in {name for pair in PAIRS for name in pair}}
    return [
        predict(pair, (made[pair[0]], made[pair[1]]), gpus, arm)
        for pair in PAIRS
        for gpus in GPUS
        for arm in LENGTHS
    ]


def table(rows: list[Row]) -> str:
    """Markdown: memory and time, one line for a pair, a number of GPUs and an arm."""
    lines = [
        "| student, teacher | GPUs (shards) | arm | shards GiB | peak GiB | rollout s | teacher s "
        "| student s | exposed s | step s | loss, share | received GiB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [
            f"{row.student}, {row.teacher}",
            f"{row.gpus} ({row.shards})",
            f"{row.arm} {row.length:,}",
            f"{row.resident / 2**30:.1f}",
            f"{row.peak / 2**30:.0f}",
        ]
        if row.fits:
            times = [row.rollout, row.teacher_pass, row.student_pass, row.exposed, row.seconds]
            cells += [f"{value:.2f}" for value in times]
            cells += [f"{row.loss_share:.0%}", f"{row.received / 2**30:,.0f}"]
        else:
            cells += ["does not fit", *[""] * 6]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def loss_table(rows: list[Row]) -> str:
    """Markdown: what the loss takes beside whole logits, which does not depend on the teacher."""
    lines = [
        "| student | tokens in a pass | whole logits GiB | ours GiB | peak with ours GiB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if row.gpus == 8:
            tokens = row.logits // (24 * MODELS[row.student]().vocab_size)
            cells = [
                f"{row.student}, {row.arm}",
                f"{tokens:,}",
                *(f"{value / 2**30:.1f}" for value in (row.logits, row.loss_bytes, row.peak)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def filled(page: str, rows: list[Row]) -> str:
    """docs/scaling.md with its tables made anew."""
    for name, text in (("steps", table(rows)), ("loss", loss_table(rows))):
        block = re.compile(f"(<!-- {name}:start -->).*?(<!-- {name}:end -->)", re.DOTALL)
        page, count = block.subn(lambda m, t=text: f"{m[1]}\n{t}\n{m[2]}", page)
        if count != 1:
            raise ValueError(f"docs/scaling.md must have one block {name!r}, found {count}")
    return page


def main() -> int:
    page, record = ROOT / "docs" / "scaling.md", ROOT / "bench" / "results" / "scaling.json"
    rows = all_rows()
    text = filled(page.read_text(encoding="utf-8"), rows)
    data = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        return int(text != page.read_text(encoding="utf-8") or data != record.read_text())
    page.write_text(text, encoding="utf-8")
    record.write_text(data)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
