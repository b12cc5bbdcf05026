"""The fused loss and plain PyTorch train alike: the demo's curve with either, from the same seed.

    python -m bench.training_curve      prints both curves, writes bench/results/training_curve.json

The two runs share weights, prompts and sampling noise and differ in `loss.impl` only, so their
curves part by rounding, which grows once a sampled token differs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from esr_train.compare import compare
from esr_train.config import Config, load_config
from esr_train.metrics import read_rows

ROOT = Path(__file__).parent.parent
ARMS = {"fused": "auto", "plain": "reference"}


def demo_config(steps: int, length: int) -> Config:
    """configs/demo.yaml with one arm per loss implementation."""
    arms = ", ".join(
        f"{{name: {name}, max_new_tokens: {length}, loss.impl: {impl}}}"
        for name, impl in ARMS.items()
    )
    overrides = [
        f"arms=[{arms}]",
        "report.baseline=plain",
        "seeds=[0]",
        f"steps={steps}",
        f"eval.every={steps}",
        "eval.problems=4",
        "eval.max_new_tokens=8",
    ]
    return load_config(ROOT / "configs" / "demo.yaml", overrides)


def curves(steps: int = 16, length: int = 32) -> dict[str, list[float]]:
    """Divergence per token of every step, by loss implementation."""
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        compare(demo_config(steps, length), run, say=lambda _: None)
        return {
            name: [
                row["divergence"]
                for row in read_rows(run / "arms" / name / "seed0" / "metrics.jsonl")
            ]
            for name in ARMS
        }


def largest_difference(by_name: dict[str, list[float]]) -> float:
    """Relative to the plain curve, over all steps."""
    pairs = zip(by_name["fused"], by_name["plain"], strict=True)
    return max(abs(fused - plain) / abs(plain) for fused, plain in pairs)


def main() -> None:
    by_name = curves()
    print(f"{'step':>4}  {'fused':>12}  {'plain':>12}  {'relative difference':>20}")
    for step, (fused, plain) in enumerate(zip(*by_name.values(), strict=True), start=1):
        print(f"{step:>4}  {fused:12.8f}  {plain:12.8f}  {abs(fused - plain) / plain:20.1e}")
    difference = largest_difference(by_name)
    print(f"largest relative difference: {difference:.1e}")
    path = ROOT / "bench" / "results" / "training_curve.json"
    path.write_text(json.dumps({**by_name, "largest_relative_difference": difference}, indent=1))


if __name__ == "__main__":
    main()
