"""The projection of a few tokens onto many classes on CPU: `gemm.project` against one product.

    make bench        or   python -m pytest bench/bench_projection.py -s

Rounds are interleaved and ratios are medians over rounds. Written to bench/results/ as JSON lines.
"""

from __future__ import annotations

import torch

from bench.measure import interleaved, median_ratio, record
from esr_kernels import gemm

SHAPES = [
    (16, 576, 49_152),
    (64, 576, 49_152),
    (256, 512, 151_936),
    (512, 256, 151_936),
]
ROUNDS = 7


def test_projection_is_no_slower_than_one_product() -> None:
    table = {}
    for tokens, dim, classes in SHAPES:
        hidden, weight = torch.randn(tokens, dim), torch.randn(classes, dim)
        ours, plain = torch.empty(tokens, classes), torch.empty(tokens, classes)
        seconds = interleaved(
            {
                "project": lambda h=hidden, w=weight, o=ours: gemm.project(h, w, o),
                "product": lambda h=hidden, w=weight, o=plain: torch.mm(h, w.T, out=o),
            },
            ROUNDS,
        )
        torch.testing.assert_close(ours, plain)
        table[f"{tokens} x {dim} x {classes}"] = median_ratio(seconds, "product", "project")
    for shape, speedup in table.items():
        print(f"{shape}: {speedup:.2f} times the speed of one product")
    record("projection_cpu", "speed over one product", ROUNDS, table)
    assert min(table.values()) > 0.9
