"""Errors against fp64, ours beside plain PyTorch's, on the pairs that make a divergence hard.

    python -m bench.numerics               writes bench/results/numerics.jsonl
    python -m bench.numerics --markdown    the table of docs/linear_divergence.md, from that file

Relative L2 errors of the gradients of hidden states and head, by the cases and the oracle of
tests/kernels/cases.py; the kernels run in Triton's interpreter. bf16 gradients are returned in
bf16, which alone costs 1.7e-3.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Triton reads it when it is imported, and torch imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    import conftest  # noqa: F401  (the interpreter rounds to bf16 as a GPU does)

import torch

from esr_kernels import JSD
from tests.kernels import cases

RESULT = Path(__file__).parent / "results" / "numerics.jsonl"
DIVERGENCES = ("forward_kl", "reverse_kl", JSD(0.3))
DTYPES = (torch.float32, torch.bfloat16)
GRADIENTS = ("d student_hidden", "d student_weight")


def errors(case_name: str, divergence: object, dtype: torch.dtype) -> dict[str, float]:
    """By "plan, impl, gradient", and "plain, gradient"."""
    found = {}
    for impl in ("torch", "triton"):
        plain, truth = cases.yardsticks(case_name, divergence, dtype, impl == "triton")
        for name in GRADIENTS:
            label = "plain" if impl == "torch" else "plain, dz rounded"
            found[f"{label}, {name}"] = cases.relative_error(plain[name], truth[name])
        for plan in ("stash", "recompute"):
            ours = cases.ours(cases.CASES[case_name](dtype), divergence, plan=plan, impl=impl)
            for name in GRADIENTS:
                key = f"{plan}, {impl}, {name}"
                found[key] = cases.relative_error(ours[name], truth[name])
    return found


def main() -> None:
    with RESULT.open("w") as file:
        for case_name in cases.CASES:
            for divergence in DIVERGENCES:
                for dtype in DTYPES:
                    found = errors(case_name, divergence, dtype)
                    record = {
                        "case": case_name,
                        "divergence": str(divergence),
                        "dtype": str(dtype).removeprefix("torch."),
                        "errors": found,
                    }
                    file.write(json.dumps(record) + "\n")
                    worst = max(
                        found[f"{plan}, {impl}, {name}"]
                        / found[f"{'plain' if impl == 'torch' else 'plain, dz rounded'}, {name}"]
                        for plan in ("stash", "recompute")
                        for impl in ("torch", "triton")
                        for name in GRADIENTS
                    )
                    print(
                        f"{case_name:<24}{divergence!s:<16}{record['dtype']:<10}worst {worst:.2f}"
                    )


def markdown() -> str:
    """A row for each case and dtype: the largest error over divergences, ours over both plans."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for line in RESULT.read_text().splitlines():
        record = json.loads(line)
        row = rows.setdefault((record["case"], record["dtype"]), {})
        for key, value in record["errors"].items():
            *how, name = key.split(", ")
            if how[0] in ("stash", "recompute"):
                how = ["ours"] if how[1] == "torch" else ["kernels"]
            column = f"{' '.join(how)} {'dX' if name.endswith('hidden') else 'dW'}"
            row[column] = max(row.get(column, 0.0), value)
    columns = [
        f"{who} {gradient}"
        for gradient in ("dX", "dW")
        for who in ("ours", "plain", "kernels", "plain dz rounded")
    ]
    lines = [
        "| case | dtype | " + " | ".join(columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for (case_name, dtype), row in rows.items():
        values = " | ".join(f"{row[column]:.1e}" for column in columns)
        lines.append(f"| {case_name.replace('_', ' ')} | {dtype} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--markdown" in sys.argv[1:]:
        print(markdown())
    else:
        main()
