"""Decode attention over shared prompts on CPU: compiled C, PyTorch's products, and what a cache of
whole sequences asks of PyTorch's own attention.

    make bench        or   python -m pytest bench/bench_prefix_attention.py -s

A step of SmolLM2-135M's 30 layers, each with keys and values of its own: 8 prompts of 128 tokens, 8
samples each, fp32, at three lengths of the responses. Rounds are interleaved and ratios are medians
over rounds. Written to bench/results/ as JSON lines.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.measure import interleaved, median_ratio, record
from esr_kernels import cpu
from esr_kernels.attention import prefix_torch
from esr_kernels.attention.arguments import AttentionOptions, Cache

PROMPTS, SAMPLES, PROMPT_LENGTH, CAPACITY = 8, 8, 128, 63
LAYERS, HEADS, KV_HEADS, DIM = 30, 9, 3, 64
ROUNDS = 9


class Layer(NamedTuple):
    prefix: tuple[Tensor, Tensor]
    suffix: tuple[Tensor, Tensor]
    whole: tuple[Tensor, Tensor]  # the same once more, a copy of the prompt for each row


def _layer() -> Layer:
    def both(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape), torch.randn(shape)

    prefix = both(PROMPTS, KV_HEADS, PROMPT_LENGTH, DIM)
    suffix = both(PROMPTS * SAMPLES, KV_HEADS, CAPACITY, DIM)
    key, value = (
        torch.cat([shared.repeat_interleave(SAMPLES, 0), own], 2)
        for shared, own in zip(prefix, suffix, strict=True)
    )
    return Layer(prefix, suffix, (key, value))


@pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")
def test_milliseconds_a_step() -> None:
    layers = [_layer() for _ in range(LAYERS)]
    query = torch.randn(PROMPTS * SAMPLES, HEADS, DIM)
    lengths = torch.full((PROMPTS,), PROMPT_LENGTH)
    options = AttentionOptions(DIM**-0.5, None, None)
    table: dict[str, dict[str, float]] = {}
    for own in (1, 32, CAPACITY):
        suffixes = torch.full((PROMPTS * SAMPLES,), own)

        def caches(layer: Layer, own=suffixes) -> tuple[Cache, Cache]:  # type: ignore[no-untyped-def]
            return Cache(*layer.prefix, lengths), Cache(*layer.suffix, own)

        def compiled(layer: Layer, caches=caches) -> Tensor:  # type: ignore[no-untyped-def]
            return cpu.attend(query, *caches(layer), None, **options._asdict())

        def in_pytorch(layer: Layer, caches=caches) -> Tensor:  # type: ignore[no-untyped-def]
            return prefix_torch.attend(query, *caches(layer), None, options)

        def whole(layer: Layer, end=PROMPT_LENGTH + own) -> Tensor:  # type: ignore[no-untyped-def]
            key, value = (states[:, :, :end] for states in layer.whole)
            out = torch.nn.functional.scaled_dot_product_attention(
                query[:, :, None], key, value, enable_gqa=True
            )
            return out[:, :, 0]

        calls = {
            "compiled": compiled,
            "PyTorch": in_pytorch,
            "whole sequences": whole,
        }
        results = [call(layers[0]) for call in calls.values()]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)
        seconds = interleaved(
            {name: lambda c=call: [c(layer) for layer in layers] for name, call in calls.items()},
            ROUNDS,
        )
        row = {name: 1e3 * statistics.median(of) for name, of in seconds.items()}
        for name in ("PyTorch", "whole sequences"):
            row[f"over {name}"] = median_ratio(seconds, "compiled", name)
        table[f"{own} of {CAPACITY} tokens"] = row
        print(f"\n{own} tokens: " + ", ".join(f"{name} {of:.2f}" for name, of in row.items()))
    record("prefix_attention_cpu", "ms a step of 30 layers", ROUNDS, table)
    for row in table.values():
        assert row["over PyTorch"] < 1 and row["over whole sequences"] < 1
