"""What `gpu_suite` has measured, as tables: no number of README.md and docs/gpu.md is typed.

python -m bench.gpu_tables FILE     prints those of another GPU, from the suite's JSON lines
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_source = RESULTS / "gpu_nvidia_h100_80gb_hbm3.jsonl"

Record = dict[str, Any]


def all_records() -> list[Record]:
    """Every record, oldest first. Raises ValueError naming the line that is none."""
    found = []
    for number, line in enumerate(_source.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            record["date"], record["name"], record["section"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{_source}, line {number} is no record: {error!r}") from error
        found.append(record)
    return sorted(found, key=lambda record: record["date"])


def records() -> dict[str, Record]:
    """The newest record of each part that was measured or checked, by its name."""
    failed = {"error", "not installed"}
    found = {r["name"]: r for r in all_records() if r["section"] == "check" or not failed & set(r)}
    # The committed tile of the first runs, which loads by pointers, has a name of its own since.
    first = found.get("fused tile: committed")
    if first is not None and first.get("tile", [True])[-1] is not True:
        del found["fused tile: committed"]
    return found


def _named(name: str, record: Record) -> str:
    """A contender's name, with what its time depends on."""
    name = f"{name}, not compiled" if name.startswith("Liger") else name
    name = name.replace("ours, 1,536", "ours, memory_budget of 1,536")
    bound = record.get("host ms", 0.0) > max(record["ms"], _HEAD_START_MS)
    return f"{name}, bound by the host" if bound else name


def machine(found: Iterable[Record]) -> str:
    """What ran where, for all the records of a table."""
    keys = ("gpu", "driver", "torch", "triton", "commit")
    values = {key: sorted({str(r[key]) for r in found}) for key in keys}
    gpu, driver, torch, triton, commit = (", ".join(values[key]) for key in keys)
    return f"{gpu}, driver {driver}, torch {torch}, triton {triton}, at commit {commit}"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _note(used: list[Record], more: str = "") -> str:
    return f"{more}{machine(used)}. By `python -m bench.gpu_suite`."


def checks() -> str:
    """How many checks passed, and the worst ratio to plain PyTorch's error."""
    found = [r for r in records().values() if r["section"] == "check"]
    wrong = [r["name"] for r in found if not r.get("ok")]
    text = f"{len(found) - len(wrong)} of {len(found)} checks passed"
    text += f"; failed: {', '.join(wrong)}" if wrong else ""
    return f"{text}. {_note(found)}"


_HEAD_START_MS = 2.5  # of the host, see `gpu_timing`
_PROBLEM = re.compile(r"T=(\d+) Ds=(\d+) Dt=(\d+) V=(\d+) beta=([\d.]+) (\w+) head: (.+)")
_LOSS = {"0.0": "forward KL", "1.0": "reverse KL"}


def divergence(only: str = "") -> str:
    """Forward + backward of every contender, one table for each problem that has `only` in it."""
    problems: dict[str, dict[str, Record]] = {}
    for name, record in records().items():
        match = _PROBLEM.fullmatch(name)
        if match and only in name:
            tokens, student, teacher, _, beta, head, contender = match.groups()
            loss = _LOSS.get(beta, f"JSD({beta})")
            what = f"T = {int(tokens):,}, D = {student}/{teacher}, {loss}, {head} head"
            problems.setdefault(what, {})[contender] = record
    parts = []
    for what, table in problems.items():
        floors = [(n, r) for n, r in table.items() if n.startswith("bare GEMMs")]
        if not floors:
            continue
        [(floor_name, floor)] = floors
        rows = [[floor_name, f"{floor['ms']:.2f}", "1.00", "", ""]]
        for contender, r in table.items():
            if "ms" in r and contender != floor_name:
                ratio = f"{r['ms'] / floor['ms']:.2f}"
                memory = f"{r['extra MiB']:,.0f}"
                rows.append([_named(contender, r), f"{r['ms']:.2f}", ratio, memory, _host(r)])
        header = ["", "ms", "times the products", "extra MiB", "host ms"]
        parts.append(f"{what}:\n\n{_table(header, rows)}")
    used = [r for table in problems.values() for r in table.values()]
    note = _note(
        used,
        "bf16, V = 151,936. Median of up to 50 runs between CUDA events, L2 flushed, the host "
        "ahead; its own time beside it. Extra: the peak beyond inputs and returned gradients. ",
    )
    return "\n\n".join([*parts, note])


def _host(record: Record) -> str:
    return f"{record['host ms']:.2f}" if "host ms" in record else ""


def calls() -> str:
    """The predictor's calls: measured beside what was predicted before the first run, by term."""
    predicted = {
        call["call"]: call
        for call in json.loads((RESULTS / "predict_before_gpu.json").read_text())["calls"]
        if call["gpu"] == "H100"
    }
    found, used, rows = records(), [], []
    for name, call in predicted.items():
        record = found.get(name)
        if record is None or "ms" not in record:
            continue
        used.append(record)
        floor = None if name.startswith("draw, ") else found.get(_floor_of(name))
        measured = f"{record['ms']:.2f}"
        ratio = f"{record['ms'] / floor['ms']:.2f}" if floor else ""
        model = call["ms"] / call["products alone ms"]
        rows.append([f"**{name}**", measured, ratio, f"{call['ms']:.2f}", f"{model:.2f}"])
        terms: dict[str, float] = {}
        for term, value in call["terms"].items():
            kind = "products" if term in ("projections", "gradient products") else term
            terms[kind] = terms.get(kind, 0.0) + 1e3 * value["seconds"]
        for term in sorted({*terms, *record.get("terms", {})}, key=lambda t: -terms.get(t, 0.0)):
            measured_ms = record.get("terms", {}).get(term, {}).get("ms")
            cells = ["" if x is None else f"{x:.3f}" for x in (measured_ms, terms.get(term))]
            rows.append([term, cells[0], "", cells[1], ""])
    header = ["", "measured ms", "times the products", "predicted ms", "predicted ratio"]
    return f"{_table(header, rows)}\n\n{_note(used, 'Terms are of a profile of five calls. ')}"


def _floor_of(call: str) -> str:
    """The name of the record of a call's products alone."""
    if call.startswith("fused statistics, "):
        return call.replace("fused statistics, ", "products, ") + ", projections"
    return call.replace("stash, ", "products, ")


def parts(*prefixes: str, columns: tuple[str, ...] = ("ms", "host ms")) -> str:
    """The records whose names start so, with some of their numbers."""
    used, rows = [], []
    for name, record in records().items():
        if name.startswith(prefixes) and not {"error", "not installed"} & set(record):
            used.append(record)
            rows.append([name, *(_number(record.get(column)) for column in columns)])
    return f"{_table(['', *columns], rows)}\n\n{_note(used)}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def tiles() -> str:
    """Fused statistics with other tiles, beside the products alone."""
    found, floor_name = records(), "products, T=8192, D=1536/3584, projections"
    floors = [r for r in all_records() if r["name"] == floor_name and "ms" in r]
    used: list[Record] = []
    rows: list[list[str]] = []
    compiled = json.loads((RESULTS / "fused_variants.json").read_text())
    for name, record in found.items():
        if name.startswith("fused tile: ") and "ms" in record:
            used.append(record)
            variant, tile = name[12:], " x ".join(map(str, record["tile"][:3]))
            if record["tile"][-1] is not True:
                variant = variant.replace("committed", "pointers")
            spilled = str(compiled["table"].get(variant, {}).get("spilled_bytes", ""))
            # Clocks differ from run to run: the floor of the run that is nearest in time.
            floor = min(floors, key=lambda r, at=record: abs(_seconds(r) - _seconds(at)))
            ms, ratio = record["ms"], record["ms"] / floor["ms"]
            rows.append([variant, tile, spilled, f"{ms:.1f}", f"{ratio:.2f}"])
    rows.sort(key=lambda row: float(row[3]))
    header = ["", "tokens x classes x depth", "spilled bytes", "ms", "times the products"]
    table = _table(header, rows)
    note = f"{machine(used)}. By `python -m bench.gpu_variants`."
    return (
        f"{table}\n\nT = 8,192, D = 1536/3584, bf16; medians of 3 to 6 runs, at 1.4 to 2.0 GHz "
        f"under the power limit, each beside the products of its own run. {note} Spilled bytes: of "
        f"today's code, by Triton {compiled['triton']} and `python -m bench.fused_variants`."
    )


def _seconds(record: Record) -> float:
    return datetime.datetime.fromisoformat(record["date"]).timestamp()


def short() -> str:
    """README's table: two problems, and what a step and a rollout of whole models take."""
    found = records()
    problem = "T={} Ds=1536 Dt=3584 V=151936 beta=1.0 trainable head: "
    names = [n.partition("head: ")[2] for n in found if n.startswith(problem.format(6400))]
    rows, used = [], []
    for name in names:
        both = [found.get(problem.format(tokens) + name) for tokens in (1600, 6400)]
        if None in both or name in ("ours, stash", "ours, recompute"):
            continue
        used += both
        floor = name.startswith("bare GEMMs")
        cells = [
            cell
            for r in both
            for cell in (f"{r['ms']:.1f}", "" if floor else f"{r['extra MiB']:,.0f}")
        ]
        shown = "the four matrix products alone" if floor else _named(name, both[0])
        rows.append([shown, *cells])
    header = ["", "T=1,600: ms", "extra MiB", "T=6,400: ms", "extra MiB"]
    table = _table(header, rows)
    step, full, ours, generate = (
        _only(found, *words)
        for words in (
            ("step, ", " 100 tokens: ours"),
            ("step, ", " 1000 tokens: ours"),
            ("rollout, D=896", "ours, with graphs"),
            ("rollout, D=896", "generate"),
        )
    )
    gpu, torch = used[0]["gpu"], used[0]["torch"]
    return (
        "reverse KL, trainable head, Ds=1536, Dt=3584, V=151936, bf16, forward + backward:\n\n"
        f"{table}\n\nA training step of 64 responses (random weights, Qwen2.5-0.5B's shape under "
        f"1.5B's) takes {step['s']:.1f} s with 100 tokens each and {full['s']:.1f} s with 1,000; "
        f"with CUDA graphs rollouts of 100 tokens are {generate['s'] / ours['s']:.1f} times faster "
        "than `generate`, which waits for the host. "
        f"{gpu}, torch {torch}; [all figures](docs/gpu.md), [a CPU's](docs/results.md)."
    )


def _only(found: dict[str, Record], start: str, end: str) -> Record:
    for name, record in found.items():
        if name.startswith(start) and name.endswith(end):
            return record
    raise ValueError(f"{_source} has no record {start!r} ... {end!r}")


BLOCKS: dict[str, Callable[[], str]] = {
    "gpu_checks": checks,
    "gpu_divergence": divergence,
    "gpu_calls": calls,
    "gpu_tiles": tiles,
    "gpu_draws": lambda: parts("draw, B", "attention, "),
    "gpu_models": lambda: parts(
        "step, ", "rollout, ", columns=("s", "update s", "rollout s", "tokens/s")
    ),
    "gpu_host": lambda: parts("host, tiny", columns=("us", "plain us", "ratio")),
}


def main() -> int:
    global _source
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    _source = parser.parse_args().file
    for name, block in BLOCKS.items():
        try:
            print(f"{name}\n\n{block()}\n")
        except (ValueError, KeyError, OSError) as error:
            print(f"{name}: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
