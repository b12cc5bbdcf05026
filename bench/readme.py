"""Fill README's result blocks from committed runs, so that no number in it is typed.

    python -m bench.readme            rewrite README.md
    python -m bench.readme --check    exit 1 where it is out of date

Sources: docs/demo and docs/smollm2 (report.md of `esr-train compare`), bench/results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def filled(readme: str) -> str:
    """README's text with every block between its markers made anew."""
    for name, text in (
        ("demo", _report("demo")),
        ("smollm2", _report("smollm2")),
        ("bench", _bench()),
        ("rollout", _rollout()),
    ):
        block = re.compile(f"(<!-- {name}:start -->).*?(<!-- {name}:end -->)", re.DOTALL)
        readme, count = block.subn(lambda m, t=text: f"{m[1]}\n{t}\n{m[2]}", readme)
        if count != 1:
            raise ValueError(f"README.md must have one block {name!r}, found {count}")
    return readme


def _report(name: str) -> str:
    """Headline and tables of a report, up to its first figure, and the machine it ran on."""
    path = ROOT / "docs" / name / "report.md"
    text = path.read_text(encoding="utf-8")
    body = text.split("\n", 1)[1]
    tables = re.split(r"^## .* against ", body, maxsplit=1, flags=re.MULTILINE)[0].strip()
    tables = re.sub(r"^## ", "#### ", tables, flags=re.MULTILINE)
    environment = json.loads((path.parent / "environment.json").read_text())
    machine = _machine(environment)
    where = f"docs/{name}/report.md"
    return f"{tables}\n\nMeasured on {machine}. Figures and samples: [{where}]({where})."


def _machine(record: dict) -> str:
    return f"{record['cpu']}, {record['threads']} threads, torch {record['torch']}"


def _bench() -> str:
    """The newest record of each problem as a table."""
    newest: dict[str, dict] = {}
    path = ROOT / "bench" / "results" / "linear_divergence_cpu.jsonl"
    for line in path.read_text().splitlines():
        record = json.loads(line)
        newest[record["problem"]] = record
    parts = []
    for problem, record in newest.items():
        lines = [
            f"{problem}, fp32, CPU:",
            "",
            "| | seconds | x GEMMs of a stash | x GEMMs of a recompute | extra memory, MiB |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, row in record["table"].items():
            memory = "" if row["extra_mib"] is None else f"{row['extra_mib']:,.0f}"
            lines.append(
                f"| {name} | {row['seconds']:.2f} | {row['over_stash_floor']:.2f} "
                f"| {row['over_recompute_floor']:.2f} | {memory} |"
            )
        parts.append("\n".join(lines))
    note = (
        f"Forward + backward, medians of {record['rounds']} interleaved rounds, "
        f"{_machine(record)}. Extra memory is what a call takes beyond its inputs and the "
        "gradients it returns. By `make bench`."
    )
    return "\n\n".join([*parts, note])


def _rollout() -> str:
    """The newest record of the decoder as a table."""
    path = ROOT / "bench" / "results" / "rollout_cpu.jsonl"
    record = json.loads(path.read_text().splitlines()[-1])
    lines = [
        f"{record['problem']}, fp32, CPU:",
        "",
        "| | tokens a second | of the bare GEMMs' | keys and values, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in record["table"].items():
        memory = "" if row["kv_mib"] is None else f"{row['kv_mib']:,.0f}"
        share = f"{row['share_of_floor']:.0%}"
        lines.append(f"| {name} | {row['tokens_per_second']:.0f} | {share} | {memory} |")
    speedup = record["table"]["ours"]["speedup_over_generate"]
    note = (
        f"{speedup:.2f} times the tokens a second of `generate`; medians of {record['rounds']} "
        f"interleaved rounds, {_machine(record)}. By `make bench`."
    )
    return "\n".join([*lines, "", note])


def main() -> int:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
