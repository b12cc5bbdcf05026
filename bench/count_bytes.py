"""Bytes that the row kernels really load and store, counted lane by lane in Triton's interpreter.

    python -m bench.count_bytes

A masked lane counts nothing, so this is the traffic that a kernel asks for; a GPU moves the same,
but for the rest of the 32-byte sectors at the ends of a row. Held against the cost model of
`plan.py` by tests/kernels/divergence/test_bytes.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

if __name__ == "__main__":
    # Triton reads it when it is imported, and torch imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import rows_triton
from esr_kernels.divergence.losses import JSD, Divergence, ReverseKL
from esr_kernels.divergence.statistics import RowSpec, Tile, merge_parts, mixed_kl, row_normalizers

TOKENS, CLASSES = 2, 20_011
_PLAIN = LogitTransform()


@dataclass
class Traffic:
    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def counted() -> Iterator[Traffic]:
    """Adds up the bytes of every load and store of the kernels interpreted inside."""
    traffic = Traffic()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def size(pointers, mask) -> int:  # type: ignore[no-untyped-def]
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    # Unmasked accesses arrive here too, with a mask of ones.
    def count_load(self, pointers, mask, *rest, **options):  # type: ignore[no-untyped-def]
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def count_store(self, pointers, value, mask, *rest, **options):  # type: ignore[no-untyped-def]
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    builder.create_masked_load, builder.create_masked_store = count_load, count_store
    try:
        yield traffic
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def row_traffic(
    divergence: Divergence, dz_dtype: torch.dtype, tokens: int = TOKENS, classes: int = CLASSES
) -> dict[str, Traffic]:
    """Traffic of each row pass over [tokens, classes] fp32 logits of both models."""
    s, t = torch.randn(2, tokens, classes, generator=torch.Generator().manual_seed(0))
    tile, spec = Tile(s, t), RowSpec(divergence, _PLAIN, _PLAIN)
    passes: dict[str, Traffic] = {}

    def run(name: str, pass_: Callable[[], object]) -> object:
        with counted() as passes[name]:
            return pass_()

    stats = merge_parts(run("statistics", lambda: rows_triton.tile_stats(tile, spec)))
    mix = divergence.kl_weights
    if mix is not None:
        _, pull_sum = mixed_kl(stats, *mix)
    else:
        sums = run("pull sums", lambda: rows_triton.tile_pull_sums(tile, stats, spec))
        pull_sum = sums[:, 1]
    normalizers = row_normalizers(stats, pull_sum)
    dz = torch.empty(tokens, classes, dtype=dz_dtype)
    weight = torch.ones(tokens)
    run("gradient", lambda: rows_triton.tile_gradient_(tile, normalizers, weight, spec, dz))
    return passes


def main() -> None:
    elements = TOKENS * CLASSES
    print(f"{TOKENS} x {CLASSES} fp32 logits of both models, dz in bf16; bytes a logit element")
    for divergence in (ReverseKL(), JSD()):
        passes = row_traffic(divergence, torch.bfloat16)
        for name, traffic in passes.items():
            print(
                f"{divergence!s:<32} {name:<10} loads {traffic.loaded / elements:6.3f}  "
                f"stores {traffic.stored / elements:6.3f}"
            )
        total = sum(traffic.total for traffic in passes.values()) / elements
        print(f"{divergence!s:<32} {'in all':<10} {total:12.3f}")


if __name__ == "__main__":
    main()
