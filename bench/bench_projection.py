"""The projection of a few tokens onto many classes on CPU, against one product.

`matmul.project`, and what it would be with the classes in front whatever the processor.

    make bench        or   python -m pytest bench/bench_projection.py -s

Rounds are interleaved and ratios are medians over rounds. Where PyTorch's product is the faster one
`project` takes it, so its speed is 1 or more but for noise: on processors so far from 0.91 to 1.71.
Written to bench/results/ as JSON lines.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.measure import interleaved, median_ratio, record
from esr_kernels.common import matmul
from esr_kernels.cpu import products

SHAPES = [
    (16, 576, 49_152),
    (64, 576, 49_152),
    (256, 512, 151_936),
    (512, 256, 151_936),
]
ROUNDS = 7


def test_projection_is_no_slower_than_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_front(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        with monkeypatch.context() as forced:
            forced.setattr(products, "is_faster", lambda: True)
            matmul.project(hidden, weight, out)

    table: dict[str, dict[str, float]] = {}
    for tokens, dim, classes in SHAPES:
        hidden, weight = torch.randn(tokens, dim), torch.randn(classes, dim)
        ours, plain = torch.empty(tokens, classes), torch.empty(tokens, classes)
        seconds = interleaved(
            {
                "project": lambda h=hidden, w=weight, o=ours: matmul.project(h, w, o),
                "classes in front": lambda h=hidden, w=weight, o=ours: in_front(h, w, o),
                "product": lambda h=hidden, w=weight, o=plain: torch.mm(h, w.T, out=o),
            },
            ROUNDS,
        )
        torch.testing.assert_close(ours, plain)
        table[f"{tokens} x {dim} x {classes}"] = {
            name: median_ratio(seconds, "product", name) for name in ("project", "classes in front")
        }
    for shape, speedups in table.items():
        shown = ", ".join(f"{name} {speedup:.2f}" for name, speedup in speedups.items())
        print(f"{shape}: {shown} times the speed of one product")
    record("projection_cpu", "speed over one product", ROUNDS, table)
    assert min(speedups["project"] for speedups in table.values()) > 0.8
