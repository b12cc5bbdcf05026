"""Seconds of the vendor's matrix products, without a GPU.

By NVIDIA's nvidia-matmul-heuristics where it is installed (a closed library with a licence of its
own; for this directory only), else by the rate that bench/gpus.py states. Its model of CUTLASS 3
gives 14.1 ms for [8192, 4096] x [4096, 151936] in bf16 on an H100, where 14 was measured.
"""

from __future__ import annotations

from functools import cache

import torch

from bench.gpus import GPUS, HBM_SHARE, Gpu
from bench.walk import Product

try:
    import nvMatmulHeuristics.nvMatmulHeuristics as vendor
except ImportError:
    vendor = None

SOURCE = "stated rate" if vendor is None else "nvidia-matmul-heuristics 0.1.0.27"
_LETTER = {torch.bfloat16: "T", torch.float16: "T", torch.float32: "S"}


def product_seconds(product: Product, gpu: Gpu, source: str = SOURCE) -> float:
    """Seconds of one product. What it adds to is read on top, at the memory's rate."""
    seconds = _vendor(product, gpu.name) if source != "stated rate" else None
    if seconds is not None:
        seconds = max(seconds, product.flops / gpu.product_rate)  # it knows no power limit
    else:
        moved = product.m * product.k + product.k * product.n
        moved = moved * product.operand.itemsize + product.m * product.n * product.out.itemsize
        # A tile of 128 x 128 is computed whole.
        rows, columns = (-(-size // 128) * 128 for size in (product.m, product.n))
        flops = 2 * rows * columns * product.k
        seconds = max(flops / gpu.product_rate, moved / (gpu.hbm * HBM_SHARE))
    added_to = product.m * product.n * product.out.itemsize * product.accumulates
    return seconds + added_to / (gpu.hbm * HBM_SHARE)


@cache
def _vendor(product: Product, name: str) -> float | None:
    gpu = GPUS[name]
    if gpu.heuristics is None or product.operand not in _LETTER:
        return None
    interface = _interface(gpu.heuristics)
    precision = _LETTER[product.operand] + "S" + _LETTER[product.out]
    layout = vendor.NvMatmulHeuristicsMatmulLayout.TN_COL_MAJOR
    problem = interface.makeNvMatmulHeuristicsProblem(product.m, product.n, product.k, layout)
    found = interface.get(problem, 8, precision)
    return found[0]["runtime"] if found else None


@cache
def _interface(name: str):  # type: ignore[no-untyped-def]
    return vendor.NvMatmulHeuristicsInterfaceEx(
        backend=vendor.NvMatmulHeuristicsTarget.CUTLASS3,
        flags=vendor.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING,
        gpu=vendor.NvMatmulHeuristicsNvidiaGpu[name],
    )
