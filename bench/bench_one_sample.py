"""One sample a prompt, the paper's setting: the shared-prefix decoder against a plain cache.

    python -m pytest bench/bench_one_sample.py -s

Both decoders run in the same engine, in turn, round after round; ratios are medians over rounds.
On the busy machine of the committed record rounds were from 0.5 to 1.2 and the medians 1.00 and
1.01: the bound leaves room for that.
Random weights, fp32, no token ends a response. Written to bench/results/ as JSON lines.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.bench_rollout import SHAPE, _NoEnd
from bench.measure import interleaved, median_ratio, record
from esr_train.rollout import PrefixRollout
from esr_train.rollout.decoder import PlainDecoder, SharedPrefixDecoder

ROUNDS = int(os.environ.get("ESR_BENCH_ROUNDS", "5"))
DEMO = {
    "vocab_size": 32,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}
# prompts, their length, new tokens
CASES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "the demo's width": (SHAPE | DEMO, 32, 20, 96),
    "SmolLM2-135M's shape, 4 layers": (SHAPE | {"num_hidden_layers": 4}, 8, 128, 24),
}


@pytest.mark.parametrize("name", CASES)
def test_one_sample_a_prompt(name: str) -> None:
    shape, count, width, length = CASES[name]
    torch.manual_seed(0)
    engine = PrefixRollout(LlamaForCausalLM(LlamaConfig(**shape)).eval(), _NoEnd())
    prompts = torch.randint(0, shape["vocab_size"], (count, width)).tolist()
    tokens: dict[str, torch.Tensor] = {}

    def run(kind: Any) -> None:
        engine._decoder_type = kind
        tokens[kind.__name__] = engine.generate(prompts, 1, length, 1.0, (0,)).tokens

    kinds = (SharedPrefixDecoder, PlainDecoder)
    seconds = interleaved({kind.__name__: lambda kind=kind: run(kind) for kind in kinds}, ROUNDS)
    assert (tokens["SharedPrefixDecoder"] == tokens["PlainDecoder"]).double().mean() > 0.9
    ratio = median_ratio(seconds, "SharedPrefixDecoder", "PlainDecoder")
    rounds = sorted(
        a / b for a, b in zip(seconds["SharedPrefixDecoder"], seconds["PlainDecoder"], strict=True)
    )
    table = {decoder: statistics.median(taken) for decoder, taken in seconds.items()}
    print(f"\n{name}: {table}, ratio {ratio:.2f}, by round {rounds[0]:.2f} to {rounds[-1]:.2f}")
    problem = f"{name}: {count} prompts x {width} tokens, 1 sample x {length} tokens"
    record("one_sample_cpu", problem, ROUNDS, {"seconds": table, "ratio": ratio, "rounds": rounds})
    assert ratio <= 1.15
