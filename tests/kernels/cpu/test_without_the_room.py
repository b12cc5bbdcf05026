"""The package without this room: switched off, and deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esr_kernels
from esr_kernels.cpu import library, products

PACKAGE = Path(esr_kernels.__file__).parent
# Of every op that this room makes faster.
TESTS = [
    "attention/test_op.py",
    "divergence/test_op.py",
    "sampling/test_op.py",
]
# All that a call reaches when nothing is supported.
STUB = """
def is_available(): return False
def supports_attention(query): return False
def supports_tiles(logits): return False
def project_transposed(hidden, weight, out, allocate): return False
def on_huge_pages(fresh): return fresh
"""
CALLS = """
import sys, torch
import esr_kernels
from esr_kernels import cpu, linear_divergence, sample_from_logits, shared_prefix_attention
from esr_kernels import SampleKeys
assert not cpu.is_available()
made = torch.Generator().manual_seed(0)
student, head, teacher, teacher_head, query, prefix, suffix = (
    torch.randn(shape, generator=made)
    for shape in ((9, 16), (5000, 16), (9, 8), (5000, 8), (4, 2, 8), (2, 1, 6, 8), (4, 1, 3, 8))
)
student.requires_grad_()
loss = linear_divergence(student, head, teacher, teacher_head, divergence="jsd").loss
loss.backward()
drawn = sample_from_logits(student.detach() @ head.T, SampleKeys(0, torch.arange(9), 0))
lengths = torch.tensor([6, 2]), torch.tensor([3, 1, 2, 3])
attended = shared_prefix_attention(query, prefix, prefix, lengths[0], suffix, suffix, lengths[1])
files = {module.__file__ for name, module in sys.modules.items() if name.startswith("esr_kernels")}
torch.save((files, loss.detach(), student.grad, drawn.tokens, attended), sys.argv[1])
"""


def _run(command: list[str], directory: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_of_every_op_pass_with_the_room_switched_off(tmp_path):
    root = PACKAGE.parent
    tests = [f"tests/kernels/{name}" for name in TESTS]
    # A broken compiler and an unwritable cache are not even noticed.
    off = {"ESR_NATIVE": "0", "ESR_CACHE": str(tmp_path / "cache"), "CC": "false"}
    out = _run(["-m", "pytest", "-q", "-p", "no:xdist", "-k", "not triton", *tests], root, **off)
    assert " passed" in out
    assert "No compiled code" not in out and not (tmp_path / "cache").exists()


def test_the_package_works_with_the_room_deleted(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "esr_kernels", ignore=shutil.ignore_patterns("cpu"))
    (tmp_path / "esr_kernels" / "cpu").mkdir()
    (tmp_path / "esr_kernels" / "cpu" / "__init__.py").write_text(STUB)
    results = []
    for root in (tmp_path, PACKAGE.parent):
        saved = tmp_path / "saved.pt"
        _run(["-c", CALLS, str(saved)], root, PYTHONPATH=str(root), ESR_NATIVE="0")
        files, *tensors = torch.load(saved)
        # An editable install supplies modules that a copy lacks.
        assert all(Path(file).is_relative_to(root) for file in files)
        results.append(tensors)
    for without, off in zip(*results, strict=True):
        assert torch.equal(without, off)


def test_the_order_of_products_follows_the_switch(monkeypatch):
    monkeypatch.setattr(products.Path, "read_text", lambda path: "AuthenticAMD")
    is_enabled = library.is_enabled.__wrapped__  # without its cache
    monkeypatch.setattr(products, "is_enabled", is_enabled)
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("ESR_NATIVE", value)
        assert products.is_faster.__wrapped__() == expected
    monkeypatch.setenv("ESR_NATIVE", "yes")
    with pytest.raises(ValueError, match="ESR_NATIVE must be 0 or 1, got 'yes'"):
        is_enabled()
