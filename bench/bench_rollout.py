"""Rollouts against transformers' generate and the bare GEMMs of the model, on CPU.

    make bench        or   python -m pytest bench/bench_rollout.py -s

The model has the shape of SmolLM2-135M with random weights, fp32; 8 prompts of 128 tokens, 8
samples each, 32 new tokens, none of which ends a response. All contenders run in turn, round after
round, and ratios are medians over rounds; before that, each runs for two tokens. The floor is the
products with the weights alone: prompts once, then every step with all rows. Written to
bench/results/ as JSON lines. On processors so far the tokens a second were 2.4 to 2.8 times those
of `generate` (with 64 new tokens). A round takes half a minute on two idle cores.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure import MIB, median_ratio, record
from esr_kernels import token_logprob
from esr_train.rollout import PrefixRollout, RolloutBatch

PROMPTS, PROMPT_LENGTH, SAMPLES, NEW_TOKENS = 8, 128, 8, 32
ROUNDS = int(os.environ.get("ESR_BENCH_ROUNDS", "2"))
SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


class _NoEnd:
    """A tokenizer, as far as sampling asks for one: no token ends a response."""

    eos_token_id = None


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def prompts(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    size = (PROMPTS, PROMPT_LENGTH)
    return torch.randint(0, SHAPE["vocab_size"], size, generator=generator).tolist()


def _ours(engine: PrefixRollout, prompts: list[list[int]], length: int) -> RolloutBatch:
    return engine.generate(prompts, SAMPLES, length, 1.0, (0,))


def _transformers(model: Any, prompts: list[list[int]], length: int) -> torch.Tensor:
    ids = torch.tensor(prompts)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_return_sequences=SAMPLES,
        max_new_tokens=length,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )


def _floor(model: Any) -> Callable[[int], None]:
    """Every product of activations with a weight, into buffers that are there."""
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    weights = [layer.weight.detach() for layer in linears]
    head = model.lm_head.weight.detach()
    rows = PROMPTS * SAMPLES
    inputs, outputs = {}, {}
    for count in (PROMPTS * PROMPT_LENGTH, rows):
        inputs[count] = {w.shape[1]: torch.randn(count, w.shape[1]) for w in weights}
        outputs[count] = {w.shape[0]: torch.empty(count, w.shape[0]) for w in [*weights, head]}

    def products(count: int, weights: list[torch.Tensor]) -> None:
        for weight in weights:
            torch.mm(inputs[count][weight.shape[1]], weight.T, out=outputs[count][weight.shape[0]])

    def run(length: int) -> None:
        products(PROMPTS * PROMPT_LENGTH, weights)
        products(rows, [head])
        for _ in range(length - 1):
            products(rows, [*weights, head])

    return run


def _check(model: Any, batch: RolloutBatch) -> None:
    """The log-probs of a few responses, from a forward pass over the whole of each."""
    assert batch.logprob is not None and not batch.finished_by_eos.any()
    for row in (0, len(batch.prompts) - 1):
        ids = torch.tensor([batch.prompts[row] + batch.response(row)])
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state[0, PROMPT_LENGTH - 1 : -1]
            scored = token_logprob(hidden, model.lm_head.weight.detach(), batch.tokens[row])
        torch.testing.assert_close(batch.logprob[row], scored.logprob, rtol=0, atol=1e-3)


def test_tokens_a_second(model: Any, prompts: list[list[int]]) -> None:
    engine = PrefixRollout(model, _NoEnd())
    batches: list[RolloutBatch] = []
    runs: dict[str, Callable[[int], object]] = {
        "ours": lambda length: batches.append(_ours(engine, prompts, length)),
        "transformers generate": lambda length: _transformers(model, prompts, length),
        "bare GEMMs": _floor(model),
    }
    for run in runs.values():
        run(2)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run(NEW_TOKENS)
            seconds[name].append(time.perf_counter() - start)
    _check(model, batches[-1])
    assert all(torch.equal(batch.tokens, batches[-1].tokens) for batch in batches[1:])
    tokens = PROMPTS * SAMPLES * NEW_TOKENS
    of_a_token = 2 * SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 64 * 4
    kv = {
        "ours": engine.kv_bytes,
        "transformers generate": of_a_token * PROMPTS * SAMPLES * (PROMPT_LENGTH + NEW_TOKENS - 1),
    }
    table = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "share_of_floor": 1 / median_ratio(seconds, name, "bare GEMMs"),
            "speedup_over_generate": median_ratio(seconds, "transformers generate", name),
            "kv_mib": kv[name] / MIB if name in kv else None,
        }
        for name in runs
    }
    _report(table)
    assert engine.kv_bytes == of_a_token * PROMPTS * (PROMPT_LENGTH + SAMPLES * (NEW_TOKENS - 1))
    assert table["ours"]["speedup_over_generate"] >= 1.6


def _report(table: dict[str, dict[str, Any]]) -> None:
    title = (
        f"SmolLM2-135M's shape, {PROMPTS} prompts x {PROMPT_LENGTH} tokens, {SAMPLES} samples x "
        f"{NEW_TOKENS} tokens"
    )
    print(f"\n{title}, fp32, {torch.get_num_threads()} threads, {ROUNDS} rounds")
    print(f"{'':<24}{'seconds':>9}{'tokens/s':>10}{'of floor':>10}{'speedup':>9}{'KV MiB':>8}")
    for name, row in table.items():
        memory = "" if row["kv_mib"] is None else f"{row['kv_mib']:.0f}"
        print(
            f"{name:<24}{row['seconds']:>9.2f}{row['tokens_per_second']:>10.0f}"
            f"{row['share_of_floor']:>10.0%}{row['speedup_over_generate']:>9.2f}{memory:>8}"
        )
    record("rollout_cpu", title, ROUNDS, table)
