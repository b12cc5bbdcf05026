"""Row passes over logits on CPU, compiled C against PyTorch: what a stash does beside products.

    make bench        or   python -m pytest bench/bench_row_passes.py -s

Statistics and gradient of 64 rows of 151,936 classes, fp32, one thread. Rounds are interleaved;
nanoseconds a logit pair are medians over rounds. Both overwrite the logits they are given, so each
call works on a fresh copy, whose cost is measured beside them and taken off. Written to
bench/results/ as JSON lines.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest
import torch

from bench.measure import interleaved, record
from esr_kernels import cpu
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence import rows_native, rows_torch
from esr_kernels.divergence.losses import JSD, Divergence, ForwardKL, ReverseKL
from esr_kernels.divergence.statistics import RowSpec, Tile

ROWS, CLASSES, ROUNDS = 64, 151_936, 7
DIVERGENCES: dict[str, Divergence] = {
    "reverse KL": ReverseKL(),
    "forward KL": ForwardKL(),
    "JSD(0.5)": JSD(),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")
def test_nanoseconds_a_logit_pair() -> None:
    logits = [3 * torch.randn(ROWS, CLASSES) for _ in range(2)]
    s, t = (torch.empty_like(z) for z in logits)

    def refill() -> None:
        s.copy_(logits[0])
        t.copy_(logits[1])

    def stash(module, divergence) -> None:  # type: ignore[no-untyped-def]
        refill()
        spec = RowSpec(divergence, LogitTransform(), LogitTransform())
        module.stash_rows_(Tile(s, t), None, spec, s)

    calls = {"copies": refill}
    for name, divergence in DIVERGENCES.items():
        for label, module in (("compiled", rows_native), ("PyTorch", rows_torch)):
            calls[f"{name}, {label}"] = lambda m=module, d=divergence: stash(m, d)
    seconds = interleaved(calls, ROUNDS)
    copies = statistics.median(seconds.pop("copies"))
    scale = 1e9 / (ROWS * CLASSES)
    table = {name: (statistics.median(of) - copies) * scale for name, of in seconds.items()}
    for name, nanoseconds in table.items():
        print(f"{name}: {nanoseconds:.2f} ns a logit pair")
    record("row_passes_cpu", "ns a logit pair", ROUNDS, table)
    for name in DIVERGENCES:
        assert table[f"{name}, compiled"] < table[f"{name}, PyTorch"]
