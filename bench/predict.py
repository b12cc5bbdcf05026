"""How long a call takes on a GPU, predicted on a machine without one. Nothing here is measured.

    python -m bench.predict                    all calls and GPUs; writes the JSON and docs/gpu.md
    python -m bench.predict --gpu H100 --dry   prints only

The call runs on tensors without data under the plan that it takes (`bench.walk`), so that its
launches are counted and not assumed. Each kernel is compiled for the GPU and priced by its memory,
cache and issue times (`bench.kernel_time`), each product by the vendor's model of its own library
(`bench.products`). The floor is the products alone, of all tokens at once, with 16-bit results.
`bench.published` holds the same terms against what others have measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from bench.ahead_of_time import Launched
from bench.gpus import GAP_SECONDS, GPUS, HBM_SHARE, HOST_SECONDS, Gpu
from bench.kernel_time import Prediction, Sizes, predict
from bench.products import SOURCE, product_seconds
from bench.published import comparisons
from bench.walk import Elementwise, Launch, Product, empty, walk
from esr_kernels import SampleKeys, linear_divergence, plan_linear_divergence, sample_from_hidden

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "predict.json"
DOCS = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- predicted: begin -->", "<!-- predicted: end -->"
_CLASSES = 151_936


@dataclass(frozen=True)
class Call:
    """One call: how it is made, the products that no implementation can leave out, and the aim."""

    name: str
    sizes: Sizes
    run: Callable[[], object]
    floor: tuple[Product, ...]
    plan: str = ""
    most_of_floor: float | None = None  # on an H100
    most_launches: int | None = None


def _product(m: int, n: int, k: int) -> Product:
    return Product(m, n, k, torch.bfloat16, torch.bfloat16, False)


def _divergence(tokens: int, dims: tuple[int, int], how: str) -> tuple[Sizes, Callable, str]:
    train, head = how != "fused", how == "trainable"

    def run() -> None:
        out = linear_divergence(
            empty(tokens, dims[0], grad=train),
            empty(_CLASSES, dims[0], grad=head),
            empty(tokens, dims[1]),
            empty(_CLASSES, dims[1]),
            plan="auto" if train else "fused",
        )
        if train:
            out.loss.backward()

    plan = plan_linear_divergence(
        tokens,
        _CLASSES,
        *dims,
        train_hidden=train,
        train_weight=head,
        plan="auto" if train else "fused",
    )
    return Sizes(tokens, _CLASSES, dims), run, str(plan)


def _draw() -> None:
    keys = SampleKeys(0, empty(64, dtype=torch.int64), empty(64, dtype=torch.int64))
    sample_from_hidden(empty(64, 1536), empty(_CLASSES, 1536), keys)


def calls() -> list[Call]:
    """The calls that docs/gpu.md speaks of."""
    found = []
    for tokens, dims, head, most, launches in (
        (8192, (1536, 3584), "trainable", 1.30, 60),
        (6400, (1536, 2048), "frozen", 1.50, None),
    ):
        sizes, run, plan = _divergence(tokens, dims, head)
        gradients = [_product(tokens, dims[0], _CLASSES)]
        if head == "trainable":
            gradients.append(_product(_CLASSES, dims[0], tokens))
        floor = (*(_product(tokens, _CLASSES, dim) for dim in dims), *gradients)
        name = f"stash, T={tokens}, D={dims[0]}/{dims[1]}, {head} head"
        found.append(Call(name, sizes, run, floor, plan, most, launches))
        sizes, run, plan = _divergence(tokens, dims, "fused")
        name = f"fused statistics, T={tokens}, D={dims[0]}/{dims[1]}"
        found.append(Call(name, sizes, run, floor[:2], plan, 1.35))
    sizes = Sizes(64, _CLASSES, (1536,))
    found.append(Call("draw, B=64, D=1536", sizes, _draw, (_product(64, _CLASSES, 1536),)))
    return found


@dataclass
class Term:
    """All launches of one kernel, or of one kind."""

    launches: int = 0
    seconds: float = 0.0
    hbm_bytes: float = 0.0
    l2_bytes: float = 0.0
    waves: float | None = None
    bound: str = ""


@dataclass
class Predicted:
    call: str
    gpu: str
    plan: str
    floor: float
    launches: int
    terms: dict[str, Term] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The GPU's time, or the host's where launching takes longer."""
        busy = sum(term.seconds for term in self.terms.values())
        return max(busy + GAP_SECONDS * self.launches, HOST_SECONDS * self.launches)

    def saved_by_epilogue(self, gpu: Gpu, sizes: Sizes) -> float:
        """Seconds if the second projection's epilogue took the statistics.

        The pass over both logits goes, and its launches; the epilogue reads the first model's
        logits, 4 bytes an element, in its place.
        """
        term = self.terms.get("row_statistics_kernel")
        if term is None:
            return 0.0
        read = 4 * sizes.tokens * sizes.classes / (gpu.hbm * HBM_SHARE)
        return term.seconds + GAP_SECONDS * term.launches - read


def predicted(call: Call, gpu: Gpu) -> Predicted:
    """Every launch of a call, priced and summed by kernel."""
    launches = walk(gpu.arch, call.run, gpu.processors)
    # NVIDIA's model prices a head that is read once for few rows at a third above its bytes.
    source = SOURCE if call.sizes.tokens >= 128 else "stated rate"
    floor = sum(product_seconds(product, gpu, source) for product in call.floor)
    result = Predicted(call.name, gpu.name, call.plan, floor, len(launches))
    for launch in launches:
        name, seconds, details = _priced(launch, gpu, call.sizes)
        term = result.terms.setdefault(name, Term())
        term.launches += 1
        term.seconds += seconds
        if isinstance(details, Prediction):
            term.hbm_bytes += details.hbm_bytes
            term.l2_bytes += details.l2_bytes
            term.waves, term.bound = details.waves, details.bound
        elif isinstance(launch, Elementwise):
            term.hbm_bytes += launch.moved
    return result


def _priced(launch: Launch, gpu: Gpu, sizes: Sizes) -> tuple[str, float, Prediction | None]:
    if isinstance(launch, Product):
        kind = "projections" if launch.n == sizes.classes else "gradient products"
        return kind, product_seconds(launch, gpu), None
    if isinstance(launch, Launched):
        details = predict(launch, gpu, sizes)
        return launch.function.fn.__name__.lstrip("_"), details.seconds, details
    return "PyTorch's other kernels", launch.moved / (gpu.hbm * HBM_SHARE), None


def verdicts(results: list[tuple[Call, Predicted]]) -> list[str]:
    """Whether each aim is met, on an H100."""
    lines = []
    for call, result in results:
        if result.gpu != "H100":
            continue
        if call.most_of_floor is not None:
            ratio = result.seconds / result.floor
            met = "met" if ratio <= call.most_of_floor else "NOT met"
            lines.append(f"{call.name}: {ratio:.2f} of its products, {call.most_of_floor} {met}")
        if call.most_launches is not None:
            met = "met" if result.launches <= call.most_launches else "NOT met"
            lines.append(f"{call.name}: {result.launches} launches, {call.most_launches} {met}")
    return lines


def table(results: list[tuple[Call, Predicted]]) -> list[str]:
    """Markdown: a line for each call and GPU."""
    lines = [
        "| call | GPU | launches | predicted ms | products alone ms | ratio | HBM GB "
        "| epilogue would save ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for call, r in results:
        saved = r.saved_by_epilogue(GPUS[r.gpu], call.sizes) * 1e3
        moved = sum(term.hbm_bytes for term in r.terms.values()) / 1e9
        lines.append(
            f"| {r.call} | {r.gpu} | {r.launches} | {r.seconds * 1e3:.2f} | {r.floor * 1e3:.2f} "
            f"| {r.seconds / r.floor:.2f} | {moved:.1f} | {f'{saved:.2f}' if saved else ''} |"
        )
    return lines


def terms_table(result: Predicted) -> list[str]:
    """Markdown: where one call's time goes."""
    lines = [
        f"{result.call} on {result.gpu}; {result.plan}",
        "",
        "| term | launches | ms | HBM GB | L2 GB | waves | bound by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, term in sorted(result.terms.items(), key=lambda item: -item[1].seconds):
        waves = "" if term.waves is None else f"{term.waves:.2f}"
        lines.append(
            f"| {name} | {term.launches} | {term.seconds * 1e3:.3f} | {term.hbm_bytes / 1e9:.2f} "
            f"| {term.l2_bytes / 1e9:.2f} | {waves} | {term.bound} |"
        )
    gaps = GAP_SECONDS * result.launches * 1e3
    lines.append(f"| gaps between launches | {result.launches} | {gaps:.3f} | | | | |")
    return lines


def published_table() -> list[str]:
    """Markdown: the same model against what others have measured."""
    lines = ["| published by others | GPU | measured ms | model ms | off |", "| --- " * 5 + "|"]
    for what, gpu, measured, seconds in comparisons():
        off = seconds * 1e3 / measured - 1
        lines.append(f"| {what} | {gpu} | {measured:g} | {seconds * 1e3:.1f} | {off:+.0%} |")
    return lines


def _json(results: list[tuple[Call, Predicted]]) -> dict[str, Any]:
    return {
        "what": "predicted, not measured",
        "triton": triton.__version__,
        "products": SOURCE,
        "calls": [
            {
                "call": r.call,
                "gpu": r.gpu,
                "plan": r.plan,
                "launches": r.launches,
                "ms": r.seconds * 1e3,
                "products alone ms": r.floor * 1e3,
                "terms": {name: vars(term) for name, term in r.terms.items()},
            }
            for _, r in results
        ],
        "published": [
            {"what": what, "gpu": gpu, "measured ms": measured, "model ms": seconds * 1e3}
            for what, gpu, measured, seconds in comparisons()
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=GPUS, action="append", help="default: all of them")
    parser.add_argument("--dry", action="store_true", help="print, and write no file")
    options = parser.parse_args(arguments)
    results = []
    for gpu in options.gpu or GPUS:
        for call in calls():
            print(f"{gpu}: {call.name}", file=sys.stderr, flush=True)
            results.append((call, predicted(call, GPUS[gpu])))
    text = [f"Predicted, not measured. Products by {SOURCE}.", "", *table(results), ""]
    for _, result in results:
        if result.gpu == (options.gpu or ["H100"])[0]:
            text += [*terms_table(result), ""]
    text += [*published_table(), ""]
    text += [f"- {line}" for line in verdicts(results)]
    print("\n".join(text))
    if not options.dry:
        RESULTS.write_text(json.dumps(_json(results), indent=1) + "\n")
        page = DOCS.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        DOCS.write_text(before + BEGIN + "\n" + "\n".join(text) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
