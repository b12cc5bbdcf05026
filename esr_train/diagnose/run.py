"""`esr-train diagnose`: every diagnostic, one after the other, and their report.

OUT/config.yaml, environment.json
    sections/NAME.json     numbers of a diagnostic, written when it is finished
    training/              a run directory with the students that were trained for it
    figures/*.png, report.md, report.html

A diagnosis that was stopped goes on when the same command is given again: sections that are
finished are read, students that are trained are loaded, one that was in training goes on from its
newest checkpoint. Into a directory with another configuration, or with anything else, it refuses.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from esr_train.config import Config, ConfigError
from esr_train.diagnose import cascade, commitment, signals, teacher_decay, where
from esr_train.diagnose.bench import Bench, arm_names, training_config
from esr_train.diagnose.page import write_page
from esr_train.diagnose.progress import Progress
from esr_train.diagnose.section import Result
from esr_train.run_dir import check_diagnosis, config_of, write_run_files

# In the order of the report.
SECTIONS = tuple(module.SECTION for module in (teacher_decay, where, cascade, commitment, signals))
# What needs trained students comes last: the rest is there if training is stopped.
_ORDER = ("where", "signals", "teacher_decay", "cascade", "commitment")


def diagnose(config: Config, out: Path, quiet: bool = False) -> Path:
    """Measure what is not measured yet, write the report, return the path of report.html.

    Raises:
        ConfigError: a key that cannot be used, or `out` holds something else.
        ContextError: an answer does not fit the context of a model.
        KeyboardInterrupt: SIGINT or SIGTERM; the same call goes on.
    """
    check_diagnosis(out, config)
    progress = Progress(quiet)
    results = read_results(out)
    todo = [name for name in _ORDER if name not in results]
    if todo:
        given = config.diagnose.run
        run_dir = out / "training" if given is None else Path(given)
        if given is not None:
            check_run(config, run_dir)
        bench = Bench(config, run_dir, trains=given is None, progress=progress)
        write_run_files(out, config)
        if given is None:
            write_run_files(run_dir, training_config(config))
        progress.line(bench.experiment.notes)
        _measure(bench, out, todo)
    return write_page(out, SECTIONS, read_results(out))


def read_results(out: Path) -> dict[str, Result]:
    """Results of the sections that are finished, by name."""
    found = {}
    for section in SECTIONS:
        path = _path(out, section.name)
        if path.is_file():
            found[section.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _measure(bench: Bench, out: Path, todo: list[str]) -> None:
    sections = {section.name: section for section in SECTIONS}
    for number, name in enumerate(todo, start=1):
        section = sections[name]
        bench.progress.line(f"[{number}/{len(todo)}] {section.title.lower()}")
        start = time.perf_counter()
        result = section.measure(bench)
        facts = {
            "problems": len(bench.problems),
            "samples": bench.samples,
            "temperature": bench.config.rollout.temperature or 1.0,
            "training_seeds": bench.config.seeds,
            "seconds": round(time.perf_counter() - start, 1),
        }
        _write(_path(out, name), {**result, "facts": facts})


def _path(out: Path, name: str) -> Path:
    return out / "sections" / f"{name}.json"


def _write(path: Path, result: Result) -> None:
    """Under another name first, so that there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    text = json.dumps(_strict(result), indent=1, allow_nan=False, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _strict(value: Any) -> Any:
    """JSON has neither NaN nor infinity: both are null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_run(config: Config, run_dir: Path) -> None:
    """Raise ConfigError unless `run_dir` is a run of the same models with the arms and seeds."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"diagnose.run: got {str(run_dir)!r}, must be the directory of a run; there is no "
            "config.yaml in it"
        )
    there = config_of(run_dir)
    for key in ("student", "teacher"):
        was, now = getattr(there, key), getattr(config, key)
        if was != now:
            raise ConfigError(
                f"diagnose.run: {run_dir} was made with another {key}: {was}, not {now}"
            )
    for arm in arm_names(config):
        for seed in config.seeds:
            if not (run_dir / "arms" / arm / f"seed{seed}").is_dir():
                raise ConfigError(
                    f"diagnose.run: {run_dir} has no arm {arm!r} with seed {seed}; set "
                    "diagnose.arms and seeds"
                )
