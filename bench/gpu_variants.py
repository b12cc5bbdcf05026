"""Blocks of the kernels, timed on a GPU: how far each table's entry is from the best that is tried.

    python -m bench.gpu_variants [--seconds 0.3] [--out FILE]

Fused statistics with the tiles of `bench.fused_variants`, and the passes over a chunk of logits
with other blocks, at Qwen's vocabulary. A variant whose statistics differ from the committed
kernel's is recorded as wrong and not timed. JSON lines, appended to the file of `bench.gpu_suite`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics as numbers
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from bench import fused_variants
from bench.gpu_suite import machine, measure, results_path
from bench.gpu_timing import Clocks, Part, Record, device, seconds_of
from bench.peers import make_operands
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import fused_triton, rows_triton
from esr_kernels.divergence.fused_triton import GROUP, Blocks
from esr_kernels.divergence.losses import ReverseKL
from esr_kernels.divergence.statistics import RowNormalizers, RowSpec, Tile, merge_parts

_TOKENS, _CLASSES, _DIMS, _ROWS = 8192, 151_936, (1536, 3584), 4096
# Beside those whose code `bench.fused_variants` counts.
_MORE_TILES = {
    f"described, {t} x {v} x {d}, {w} warps, {n} stages": (
        Blocks(t, v, d, w, n, True),
        False,
        False,
    )
    for t, v, d, w, n in (
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 6),
        (128, 128, 128, 8, 2),
        (128, 128, 128, 8, 3),
        (256, 64, 64, 8, 4),
        (64, 256, 64, 8, 4),
        (256, 128, 64, 16, 4),
        (128, 256, 64, 16, 4),
    )
}
_GROUPS = (4, 16, 64)  # token blocks that walk the classes together
_SPEC = RowSpec(ReverseKL(), LogitTransform(), LogitTransform())


def fused(seconds: float) -> Iterator[Part]:
    """Every tile of the fused statistics."""
    x = make_operands(_TOKENS, *_DIMS, _CLASSES, dtype=torch.bfloat16, device=device())
    operands = [
        x.student_hidden.detach(), x.student_weight.detach(), x.teacher_hidden, x.teacher_weight
    ]  # fmt: skip
    committed, *rest = {**fused_variants.VARIANTS, **_MORE_TILES}.items()
    truth = merge_parts(fused_variants.statistics(operands, *committed[1]))
    for name, how in (committed, *rest):
        yield f"fused tile: {name}", partial(_fused, operands, how, truth, seconds)
    for group in _GROUPS:
        name = f"fused tile: committed, groups of {group}"
        yield name, partial(_fused, operands, committed[1], truth, seconds, group)


def _fused(
    operands: list[torch.Tensor], how: tuple, truth: tuple, seconds: float, group: int = GROUP
) -> Record:
    with mock.patch.object(fused_triton, "GROUP", group):
        return _fused_tile(operands, how, truth, seconds)


def _fused_tile(operands: list[torch.Tensor], how: tuple, truth: tuple, seconds: float) -> Record:
    run = partial(fused_variants.statistics, operands, *how)
    # Log-sum-exps and mean differences: an argmax may change with the rounding of a tie.
    pairs = zip(merge_parts(run())[:5], truth[:5], strict=True)
    worst = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    if not worst <= 1e-3:
        return {"error": f"statistics differ by up to {worst}"}
    return {"tile": list(how[0]), **_timed(run, seconds), "differs by": worst}


def _timed(run: Callable[[], object], seconds: float) -> Record:
    times, _ = seconds_of(run, seconds)
    return {"ms": 1e3 * numbers.median(times), "runs": len(times)}


def rows(seconds: float) -> Iterator[Part]:
    """Statistics and gradient of a chunk of logits, with other blocks."""
    s, t = (3 * torch.randn(_ROWS, _CLASSES, device=device()) for _ in range(2))
    dz = torch.empty(_ROWS, _CLASSES, device=device(), dtype=torch.bfloat16)
    tile = Tile(s, t)
    one = torch.ones(_ROWS, device=device())
    normalizers = RowNormalizers(*(one for _ in RowNormalizers._fields))
    passes: dict[str, tuple[str, list[tuple[int, int]], Callable[[], object], int]] = {
        "statistics": (
            "STATISTICS_BLOCK",
            [(1, 4), (2, 4), (4, 4), (1, 8), (2, 8), (1, 16)],
            lambda: rows_triton.tile_stats(tile, _SPEC),
            8,
        ),
        "gradient": (
            "GRADIENT_BLOCK",
            [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)],
            lambda: rows_triton.tile_gradient_(tile, normalizers, None, _SPEC, dz),
            10,
        ),
    }
    for name, (table, blocks, run, pair_bytes) in passes.items():
        for block in blocks:
            yield (
                f"{name} of rows, block {block}",
                partial(_rows, table, block, run, pair_bytes, seconds),
            )


def _rows(
    table: str, block: tuple[int, int], run: Callable[[], object], pair_bytes: int, seconds: float
) -> Record:
    with mock.patch.object(rows_triton, table, block):
        record = _timed(run, seconds)
    return {**record, "GB/s": pair_bytes * _ROWS * _CLASSES / record["ms"] / 1e6}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each variant")
    parser.add_argument("--only", default="", help="variants whose name has this expression")
    parser.add_argument("--out", type=Path, help="JSON lines; default that of bench.gpu_suite")
    options = parser.parse_args(arguments)
    try:
        wanted = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r}: {error}")
    if not torch.cuda.is_available():
        print("gpu_variants needs a CUDA device and finds none")
        return 2
    # Descriptors made in a kernel live in memory that the host lends it.
    import triton

    triton.set_allocator(lambda size, _, __: torch.empty(size, dtype=torch.int8, device="cuda"))
    where, ran = machine(), 0
    out = options.out or results_path(where)
    with Clocks() as clocks, out.open("a") as file:
        for parts in (rows(options.seconds), fused(options.seconds)):
            for name, part in parts:
                if not wanted.search(name):
                    continue
                ran += 1
                record = measure("variant", name, part, clocks)
                print(record, flush=True)
                file.write(json.dumps({**record, **where}) + "\n")
                file.flush()
    if not ran:
        print(f"no variant has {options.only!r} in its name")
    return 0 if ran else 2


if __name__ == "__main__":
    sys.exit(main())
