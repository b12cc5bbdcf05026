"""Every script of examples/ runs, from another directory and without the network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
NEEDS = {"trl_distillation": "trl"}  # a package that no extra but `bench` has
# Packages are imported once; then each example has a process of its own, forked from this one.
RUN = """
import os, runpy, sys, traceback
import accelerate, esr_train.train, torch
for name, path in zip(sys.argv[1::2], sys.argv[2::2]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 1)
        sys.argv[:] = [path]
        sys.path.insert(0, os.path.dirname(path))
        try:
            runpy.run_path(path, run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} failed")
"""


def _numbers(text: str, pattern: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def _falls(text: str, pattern: str, to: float) -> bool:
    values = _numbers(text, pattern)
    return len(values) >= 3 and 0 < values[-1] < to * values[0]


def _list_falls(text: str, before: str) -> bool:
    values = _numbers(re.findall(rf"{before} \[(.*)\]", text)[0], r"[\d.]+")
    return len(values) == 4 and 0 < values[-1] < 0.9 * values[0]


# What a script prints when it has done its work.
SANE = {
    "bare_loop": lambda text: _falls(text, r"reverse KL ([\d.]+)", 0.5),
    "accelerate_loop": lambda text: _falls(text, r"reverse KL ([\d.]+)", 0.7),
    "custom_divergence": lambda text: "it agrees" in text,
    "custom_task": lambda text: (
        _falls(text, r"divergence ([\d.]+)", 0.8)
        and _numbers(text, r"'greedy_accuracy': ([\d.]+)")[-1] > 0.7
    ),
    "hf_trainer": lambda text: _list_falls(text, "forward KL:"),
    "trl_distillation": lambda text: (
        _list_falls(text, "reverse KL, TRL patched:") and _list_falls(text, "reverse KL, subclass:")
    ),
    "sampling": lambda text: (
        "draws the same: True" in text
        and all(
            abs(float(p) - float(drawn)) < 0.02
            for p, drawn in re.findall(r"probability ([\d.]+), drawn ([\d.]+)", text)
        )
    ),
    "score_text": lambda text: (
        text.count("\n") > 30 and 0.05 < _numbers(text, r"mean reverse KL ([\d.]+)")[0] < 1
    ),
    "topk_teacher": lambda text: (
        _falls(text, r"over all tokens ([\d.]+)", 0.5)
        and all(
            float(lower) <= float(exact)
            for lower, exact in re.findall(r"top 8 ([\d.]+), over all tokens ([\d.]+)", text)
        )
    ),
    "two_tokenizers": lambda text: (
        _falls(text, r"'divergence': ([\d.]+)", 0.8)
        and all(0.3 < share < 1 for share in _numbers(text, r"'aligned_share': ([\d.]+)"))
    ),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example prints."""
    out = tmp_path_factory.mktemp("examples")
    some = [name for name in EXAMPLES if _installed(name)]
    command = [part for name in some for part in (name, str(EXAMPLES[name]))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("TRITON_INTERPRET", None)  # of the tests of kernels
    run = subprocess.run(
        [sys.executable, "-c", RUN, *command],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return {name: (out / name).read_text() for name in some}


def _installed(name: str) -> bool:
    return name not in NEEDS or importlib.util.find_spec(NEEDS[name]) is not None


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_and_says_what_it_did(name: str, outputs: dict[str, str]) -> None:
    if name not in outputs:
        pytest.skip(f"{NEEDS[name]} is not installed")
    assert SANE[name](outputs[name]), outputs[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_short(name: str) -> None:
    assert len(EXAMPLES[name].read_text().splitlines()) <= 40
