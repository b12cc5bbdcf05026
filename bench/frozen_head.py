"""What a frozen head's call would take with fewer bytes, from the terms that are predicted."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent / "results" / "predict.json"
# What would move fewer bytes, the bytes a pair of logits that are left of 18, and why it is not
# built.
FEWER_BYTES = (
    (
        "statistics in the second projection's epilogue",
        14,
        "the vendor's products have no such epilogue",
    ),
    (
        "both passes in one launch, the gradient some rows behind the statistics, its logits still "
        "in the cache",
        10,
        "programs that wait for the flags of others, which no machine here can try",
    ),
    (
        "a launch for every 16 rows, the gradient of some and the statistics of the next",
        10,
        "400 launches, whose gaps and tails are not in these figures",
    ),
    (
        "a row to a program, statistics forwards, gradient backwards",
        17,
        "132 rows of 1.2 MB are six times the cache",
    ),
)


def block() -> str:
    """The terms of that call on an H100, and what fewer bytes a pair would make of it."""
    record = json.loads(RECORD.read_text())
    [call] = [c for c in record["calls"] if c["gpu"] == "H100" and "frozen" in c["call"]]
    milliseconds = {name: 1e3 * term["seconds"] for name, term in call["terms"].items()}
    passes = milliseconds["row_statistics_kernel"] + milliseconds["gradient_kernel"]
    products = call["products alone ms"]
    wide = milliseconds["projections"] + milliseconds["gradient products"] - products
    head = (
        f"{call['ms']:.1f} ms, of which the products with 16-bit results are {products:.1f}; the "
        f"aim leaves {1.5 * products:.1f}. The projections' fp32 results are {wide:.1f} ms more "
        "than the products alone; statistics and gradient move 8 + 10 bytes a pair of logits, "
        f"{passes:.1f} ms, at the memory's bandwidth. What would take fewer bytes:"
    )
    lines = ["| | bytes a pair | predicted ms | why not |", "| --- | ---: | ---: | --- |"]
    for what, left, reason in FEWER_BYTES:
        total = call["ms"] - passes * (18 - left) / 18
        lines.append(f"| {what} | {left} | {total:.1f} | {reason} |")
    return "\n".join([head, "", *lines])
