"""Fill the result blocks of README.md and docs/ from committed runs, so that no number is typed.

    python -m bench.readme            rewrite the pages
    python -m bench.readme --check    exit 1 where one is out of date

Sources: docs/demo, docs/smollm2, docs/sudoku and docs/tally (report.md of `esr-train compare`), the
cards of configs/sudoku and configs/tally/adapter, bench/results.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import curve_figures, gpu_tables
from esr_train.config import arm_config, load_config

ROOT = Path(__file__).parent.parent


def pages() -> dict[str, dict[str, Callable[[], str]]]:
    """The blocks of each page: its name between the markers, and what makes its text."""
    return {
        "README.md": {"demo": lambda: _headline("demo"), "gpu": gpu_tables.short},
        "docs/results.md": {
            "demo": lambda: _report("demo"),
            "smollm2": lambda: _report("smollm2"),
            "bench": _bench,
            "rollout": _rollout,
        },
        "docs/rollouts.md": {"decode": _decode, "rollout": _rollout},
        "docs/sampling.md": {"sampling": _sampling},
        "docs/from-trl.md": {"train_step": _train_step},
        "docs/gpu.md": {
            "host_time": _host_time,
            **gpu_tables.BLOCKS,
        },
        "docs/tally.md": {"adapter": _adapter, "tally": lambda: _report("tally"), "ends": _ends},
        "docs/sudoku.md": {"card": _puzzles, "sudoku": lambda: _report("sudoku")},
        "docs/curves.md": {name: partial(curve_figures.block, name) for name in curve_figures.AXES},
        "docs/fork.md": {"forks": _forks},
        "docs/findings.md": {"demo": lambda: _headline("demo")}
        | {
            block + name: lambda pair=pair, title=title: _finding(pair, title)  # type: ignore[misc]
            for block, pair in {"": "demo", "sudoku-": "sudoku", "tally-": "tally"}.items()
            for name, title in SECTIONS.items()
        },
    }


def filled(name: str) -> str:
    """The text of a page with every block between its markers made anew."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for block, make in pages()[name].items():
        between = re.compile(f"(<!-- {block}:start -->).*?(<!-- {block}:end -->)", re.DOTALL)
        made = make()
        text, count = between.subn(lambda m, t=made: f"{m[1]}\n{t}\n{m[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{name} must have one block {block!r}, found {count}")
    return text


def _headline(name: str) -> str:
    """The first sentence of a report and the machine it ran on."""
    directory = ROOT / "docs" / name
    text = (directory / "report.md").read_text(encoding="utf-8")
    [headline] = re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE)[:1]
    machine = _machine(json.loads((directory / "environment.json").read_text()))
    return f"> {headline}\n>\n> {machine}."


def _report(name: str) -> str:
    """Headline and tables of a report, up to its first figure, and the machine it ran on."""
    path = ROOT / "docs" / name / "report.md"
    text = path.read_text(encoding="utf-8")
    body = text.split("\n", 1)[1]
    tables = re.split(r"^## .* against ", body, maxsplit=1, flags=re.MULTILINE)[0].strip()
    tables = re.sub(r"^## ", "### ", tables, flags=re.MULTILINE)
    environment = json.loads((path.parent / "environment.json").read_text())
    machine = _machine(environment)
    where = f"{name}/report.md"
    return f"{tables}\n\nMeasured on {machine}. Figures and samples: [{where}]({where})."


# Sections of docs/diagnose-demo, -sudoku and -tally, by the block of docs/findings.md.
SECTIONS = {
    "decay": "Teacher decay",
    "where": "Where the divergence is",
    "cascade": "Cascading alignment",
    "commitment": "Sub-mode commitment",
    "signals": "Position against signal",
}


def _finding(pair: str, title: str) -> str:
    """The sentences of a section of a pair's diagnosis."""
    text = (ROOT / "docs" / f"diagnose-{pair}" / "report.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"^## \d\. {title}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return "\n".join(re.findall(r"^- .*$", section, re.M))


def _adapter() -> str:
    """What the committed adapter was measured to do."""
    card = json.loads((ROOT / "configs" / "tally" / "adapter" / "card.json").read_text())
    found = card["greedy_accuracy"]
    return (
        f"| greedy accuracy, {found['problems']} held-out problems | |\n| --- | ---: |\n"
        f"| SmolLM2-135M-Instruct | {found['without_adapter']:.3f} |\n"
        f"| with the adapter (the teacher) | {found['with_adapter']:.3f} |"
    )


def _puzzles() -> str:
    """What the models of docs/sudoku.md were measured to solve before any distillation."""
    card = json.loads((ROOT / "configs" / "sudoku" / "card.json").read_text())
    rows = [
        f"| {name}, {card[name]['steps']} steps | {card[name]['solved']['greedy']:.2f} "
        f"| {card[name]['solved']['sampled']:.2f} |"
        for name in ("student", "teacher")
    ]
    head = "| share of 128 held-out puzzles that are right in all places | greedy | sampled |"
    return "\n".join([head, "| --- | ---: | ---: |", *rows])


# Reports of docs/fork.md, by where student and teacher part.
FORKS = {"demo": "0", "fork-40": "43 to 48", "fork-120": "111 to 126", "fork-none": "nowhere"}


def _forks() -> str:
    """The arms of every report of docs/fork.md as one table."""
    lines = [
        "| fork, characters | arm | rate | greedy accuracy | sampled accuracy | full's with "
        "its tokens | there | tokens to 0.9 | full's over it |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    machines = set()
    for name, fork in FORKS.items():
        directory = ROOT / "docs" / name
        summary = json.loads((directory / "summary.json").read_text())
        config = load_config(directory / "config.yaml")
        rates = {arm["name"]: arm_config(config, arm).optim.lr for arm in config.arms}
        machines.add(_machine(json.loads((directory / "environment.json").read_text())))
        for arm in summary["arms"]:
            tokens = arm["to_threshold"]["tokens"]
            cells = [
                f"[{fork}]({name}/report.md)" if arm is summary["arms"][0] else "",
                arm["name"],
                f"{rates[arm['name']]:g}",
                f"{arm['start']['middle']:.2f} to {_spread(arm['final'], 2)}",
                _sampled(directory, arm["name"]),
                "-" if arm["name"] == "full" else _full_with_tokens_of(directory, arm["name"]),
                f"{arm['reached']} of {arm['evaluated']}",
                "not reached" if isinstance(tokens, str) else f"{tokens:,.0f}",
                _spread((arm["ratios"] or {}).get("tokens"), 1),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    note = (
        "Accuracies: mean before training, and mean, lowest and highest seed after it. Full's with "
        "its tokens: mean sampled accuracy of full rollouts at the tokens with which the arm ends, "
        "interpolated between evaluations. There: seeds that reach a greedy accuracy of 0.9. "
        "Tokens that training generated until then, medians of seeds; full's over the arm's, with "
        "a 95 % bootstrap interval over seeds. "
        f"{'; '.join(sorted(machines))}."
    )
    return "\n".join([*lines, "", note])


def _evaluations(directory: Path, arm: str) -> list[tuple[list[float], list[float]]]:
    """Generated tokens and sampled accuracy at the evaluations of each seed."""
    found = []
    for path in sorted((directory / "arms" / arm).glob("seed*/evals.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        accuracies = [row["metrics"]["sampled_accuracy"] for row in rows]
        found.append(([row["tokens"] for row in rows], accuracies))
    return found


def _sampled(directory: Path, arm: str) -> str:
    """Sampled accuracy before and after training, over the seeds of an arm."""
    runs = [accuracies for _, accuracies in _evaluations(directory, arm)]
    ends = [run[-1] for run in runs]
    end = {"low": min(ends), "middle": sum(ends) / len(ends), "high": max(ends)}
    return f"{sum(run[0] for run in runs) / len(runs):.2f} to {_spread(end, 2)}"


def _full_with_tokens_of(directory: Path, arm: str) -> str:
    """Mean sampled accuracy of full rollouts at the tokens with which an arm ends."""
    pairs = zip(_evaluations(directory, arm), _evaluations(directory, "full"), strict=True)
    there = [float(np.interp(own[0][-1], *full)) for own, full in pairs]
    return f"{sum(there) / len(there):.2f}"


def _spread(found: dict[str, Any] | None, digits: int) -> str:
    """A middle value with its limits; - where there is none."""
    if not found or not isinstance(found["middle"], float | int):
        return "-"
    low, middle, high = (
        f"{found[key]:,.{digits}f}" if isinstance(found[key], float | int) else "no limit"
        for key in ("low", "middle", "high")
    )
    return f"{middle} ({low} to {high})"


def _ends() -> str:
    """Right counts and right answers of the students of docs/tally."""
    positions = {"0_31": "0-31", "32_63": "32-63", "64_95": "64-95", "96_end": "96 to the end"}
    table = [
        f"| | {' | '.join(positions.values())} | right count | right answer | answers that end |",
        "| --- |" + " ---: |" * (len(positions) + 3),
    ]
    rows = [("tally", name, name) for name in ("start", "esr-32", "full")]
    rows += [("tally-bf16", name, f"{name}, in bf16") for name in ("esr-32", "full")]
    for run, arm, label in rows:
        path = ROOT / "docs" / run / "evaluated" / f"{arm}.json"
        found = json.loads(path.read_text())["metrics"]
        divergences = [f"{found['heldout_kl_' + name]:.3f}" for name in positions]
        shares = [f"{found[key]:.3f}" for key in ("greedy_counted", "greedy_accuracy", "eos_rate")]
        table.append(f"| {label} | {' | '.join(divergences + shares)} |")
    return "\n".join(table)


def _machine(record: dict) -> str:
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    return f"{record['cpu']}, {threads}, torch {record['torch']}"


def _newest(name: str) -> dict[str, Any]:
    """The newest record of each problem of a benchmark."""
    lines = (ROOT / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()
    return {record["problem"]: record for record in map(json.loads, lines)}


def _bench() -> str:
    """The newest record of each problem as a table."""
    parts = []
    for problem, record in _newest("linear_divergence_cpu").items():
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


def _decode() -> str:
    """Launches and bytes of a step of both decoders."""
    lines = ["| | rows | N | launches, shared / plain | MB, shared / plain |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for row in json.loads((ROOT / "bench" / "results" / "count_decode.json").read_text()):
        launches, sizes = (
            " / ".join(f"{row[kind][what]:,}" for kind in ("shared", "plain"))
            for what in ("launches", "mb")
        )
        lines.append(f"| {row['model']} | {row['rows']} | {row['new']:,} | {launches} | {sizes} |")
    return "\n".join(lines)


def _sampling() -> str:
    """Times of a draw over the head's product, of the newest record of each problem."""
    lines = ["| | ours | transformers + multinomial |", "| --- | ---: | ---: |"]
    for problem, record in _newest("sampling_cpu").items():
        shares = [
            record["table"][name]["over_product"] for name in ("ours", "transformers, multinomial")
        ]
        what, _, sizes = problem.partition(", B=")
        lines.append(f"| {what} | {shares[0]:.2f} | {shares[1]:.2f} |")
    note = (
        f"B={sizes}, fp32; times relative to the head's product in the same run, medians of "
        f"{record['rounds']} rounds, {_machine(record)}. By `make bench`."
    )
    return "\n".join([*lines, "", note])


def _host_time() -> str:
    """What the host pays for a small call, of the newest record."""
    [record] = _newest("host_time_cpu").values()
    lines = ["| | times plain PyTorch | aim |", "| --- | ---: | ---: |"]
    for name, row in record["table"].items():
        lines.append(f"| {name} | {row['ratio']:.2f} | {row['aim'] or ''} |")
    note = (
        f"Medians of {record['rounds']} rounds of the thread's own time, {_machine(record)}, "
        "shared with other work. By `python -m bench.host_time`; no GPU took part."
    )
    return "\n".join([*lines, "", note])


def _train_step() -> str:
    """A whole step by phase, of the newest record of each problem."""
    parts = []
    for problem, record in _newest("train_step_cpu").items():
        lines = [
            f"{problem}:",
            "",
            "| | rollout | teacher | student, loss | optimizer | step | x TRL | peak, MiB |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, row in record["table"].items():
            phases = ("rollout", "teacher", "student", "optimizer", "step", "over_trl")
            cells = [f"{row[phase]:.2f}" for phase in phases]
            memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
            lines.append("| " + " | ".join([name, *cells, memory]) + " |")
        parts.append("\n".join(lines))
    note = (
        f"fp32, processor seconds, medians of {record['rounds']} interleaved rounds, "
        f"{_machine(record)}, shared with other work. Peak: resident memory of the process, all "
        "libraries included. By `python -m pytest bench/bench_train_step.py`."
    )
    return "\n\n".join([*parts, note])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where out of date")
    options = parser.parse_args()
    stale = [name for name in pages() if filled(name) != (ROOT / name).read_text(encoding="utf-8")]
    if options.check:
        for name in stale:
            print(f"{name} is out of date: python -m bench.readme")
        return int(bool(stale))
    for name in stale:
        (ROOT / name).write_text(filled(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
