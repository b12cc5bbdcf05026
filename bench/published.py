"""What others have measured, and what the model of `bench.predict` says of their algorithm.

Each is written down as its authors describe it: products, and passes over logits in bytes. No
kernel of theirs is compiled, so this checks the products' times, the memory's rate and the
accounting, not the counting of issue slots.

Sources: TRL issue 7244 (H100); Liger pull requests 1339 (B200), 1422 and 1472 (H200), and Liger's
committed benchmark CSV (H100).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import kl_div

from bench.gpus import GAP_SECONDS, GPUS, HBM_SHARE, Gpu
from bench.products import product_seconds
from bench.walk import Elementwise, Product, empty, walk

Comparison = tuple[str, str, float, float]  # what, GPU, measured ms, predicted seconds

# (rows, ms of Liger's linear JSD, ms of PyTorch's)
_JSD_OF_LIGERS_CSV = ((1024, 111, 26), (2048, 126, 49), (4096, 144, 98), (8192, 182.6, 195.3))


def _seconds(m: int, n: int, k: int, gpu: Gpu, adds: bool = False) -> float:
    return product_seconds(Product(m, n, k, torch.bfloat16, torch.bfloat16, adds), gpu)


def _moved(size: float, gpu: Gpu) -> float:
    return size / (gpu.hbm * HBM_SHARE)


def _cross_entropy(rows: int, depth: int, classes: int, chunk: int, gpu: Gpu) -> float:
    """Chunks of rows; 16-bit logits read twice and their gradient written over them."""
    chunks = math.ceil(rows / chunk)
    seconds = chunks * _seconds(chunk, classes, depth, gpu)
    seconds += chunks * _seconds(chunk, depth, classes, gpu)
    seconds += chunks * _seconds(classes, depth, chunk, gpu, adds=chunks > 1)
    return seconds + _moved(6.0 * rows * classes, gpu) + 6 * chunks * GAP_SECONDS


def _liger_jsd(rows: int, depth: int, classes: int, gpu: Gpu) -> float:
    """Chunks of a power of two of rows; about 100 bytes a logit in passes; the head's gradient in
    a product of its own, then added."""
    chunk = 1 << (math.ceil(rows / math.ceil(classes / depth)) - 1).bit_length()
    chunks = math.ceil(rows / chunk)
    seconds = chunks * 2 * _seconds(chunk, classes, depth, gpu)
    seconds += chunks * (
        _seconds(chunk, depth, classes, gpu) + _seconds(classes, depth, chunk, gpu)
    )
    seconds += chunks * _moved(6.0 * classes * depth, gpu)
    return seconds + _moved(100.0 * rows * classes, gpu) + 30 * chunks * GAP_SECONDS


def _plain_jsd(rows: int, depth: int, classes: int, gpu: Gpu) -> float:
    """PyTorch with all logits in fp32, its operations counted by walking it."""

    def log_probs(weight_grad: bool) -> torch.Tensor:
        hidden, weight = (
            empty(rows, depth, grad=weight_grad),
            empty(classes, depth, grad=weight_grad),
        )
        return (hidden @ weight.T).float().div(1.0).log_softmax(-1)

    def run() -> None:
        p, q = log_probs(True), log_probs(False)
        log_m = torch.log(0.5 * p.exp() + 0.5 * q.exp())
        loss = sum(0.5 * kl_div(log_m, x, reduction="none", log_target=True) for x in (p, q))
        loss.sum(-1).mean().backward()

    seconds = 0.0
    for launch in walk(gpu.arch, run):
        if isinstance(launch, Product):
            seconds += product_seconds(launch, gpu)
        elif isinstance(launch, Elementwise):
            seconds += _moved(launch.moved, gpu) + GAP_SECONDS
    return seconds


def comparisons() -> Iterator[Comparison]:
    """(what, GPU, measured ms, predicted seconds) of published figures that name a shape."""
    h100, h200, b200 = GPUS["H100"], GPUS["H200"], GPUS["B200"]
    bare = _seconds(8192, 151_936, 4096, h100)
    bare += _seconds(8192, 4096, 151_936, h100) + _seconds(151_936, 4096, 8192, h100)
    yield (
        "bare products of a head, 8192 x 4096 x 151,936 (TRL 7244; sets the rate)",
        "H100",
        42.0,
        bare,
    )
    for factor, measured in ((1, 53.0), (8, 37.7), (16, 35.1)):
        seconds = _cross_entropy(8192, 4096, 128_256, 256 * factor, h200)
        what = f"Liger linear cross-entropy, 8192 x 4096 x 128,256, chunks of {256 * factor} (1472)"
        yield what, "H200", measured, seconds
    # 691 to 768 TFLOP/s published; the middle.
    flops = 4 * 8192 * 2048 * 131_072
    backward = _seconds(8192, 2048, 131_072, h200) + _seconds(131_072, 2048, 8192, h200)
    what = "Liger backward products, 8192 x 2048 x 131,072 (1422; sets the rate)"
    yield what, "H200", flops / 730e12 * 1e3, backward
    what = "Liger linear cross-entropy, 8192 x 4096 x 128,256 (1339)"
    yield what, "B200", 17.5, _cross_entropy(8192, 4096, 128_256, 8192, b200)
    for rows, liger, plain in _JSD_OF_LIGERS_CSV:
        what = f"{rows} x 4096/4096 x 128,256"
        sizes = rows, 4096, 128_256, h100
        yield f"Liger linear JSD 0.3.1, {what}", "H100", liger, _liger_jsd(*sizes)
        yield f"plain PyTorch JSD, {what}", "H100", plain, _plain_jsd(*sizes)
