"""What the static gate of the GPU kernels lets through, and that today's kernels pass it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from triton.runtime.jit import KernelInterface

import esr_kernels
from bench.gpu_static import Compiled, cdna3_resident_warps, cuda_resident_warps
from bench.kernel_variants import KERNELS
from esr_kernels.divergence.fused_triton import BLOCKS

ROOT = Path(__file__).parents[1]
GOOD = Compiled(
    arch="sm_90",
    kernel="fused_statistics_kernel",
    variant="fused: bf16",
    operand="*bf16",
    blocks="128x128x64",
    warps=8,
    registers=255,
    spilled_bytes=0,
    shared_bytes=98_304,
    resident_warps=8,
    occupancy=0.125,
    matrix_instructions=8,
    products=8,
    wide_loads=0,
    async_copies_in_loops=8,
    local_accesses=0,
    warpgroup_products=8,
    wide_copies=8,
)


def test_every_kernel_is_listed():
    found = set()
    for path in Path(esr_kernels.__file__).parent.rglob("*_triton.py"):
        module = importlib.import_module(".".join(["esr_kernels", path.parent.name, path.stem]))
        found |= {
            name.lstrip("_")
            for name, value in vars(module).items()
            if name.endswith("_kernel") and isinstance(value, KernelInterface)
        }
    assert found == set(KERNELS)


def test_sm_90_passes(tmp_path):
    """In a process of its own: the tests' kernels are interpreted, not compiled.

    `make static` compiles the other variants and the other targets.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = tmp_path / "static.json"
    options = ["--arch", "sm_90", "--only", "fused: fp16", "--only", "rows: reverse"]
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu_static", *options, "--json", str(result)],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = json.loads(result.read_text())["sm_90"]
    rows = {"row_statistics_kernel", "merge_kernel", "gradient_kernel"}
    assert set(kernels) == {"fused_statistics_kernel", *rows}
    [fused] = kernels["fused_statistics_kernel"].values()
    # Narrower than in the table: the variant has a bias and a softcap.
    blocks = BLOCKS["16-bit", "sm_90"]._replace(classes=64)
    assert fused["blocks"] == "x".join(map(str, blocks[:3]))
    for variants in kernels.values():
        for row in variants.values():
            assert 16 <= row["registers"] <= 255 and row["resident_warps"] >= row["warps"]


def test_a_spill_is_a_fault():
    assert not GOOD.faults
    assert "spills 8 bytes" in replace(GOOD, spilled_bytes=8).faults[0]
    assert replace(GOOD, arch="gfx942", spilled_bytes=8).faults
    assert not replace(GOOD, arch="sm_80", spilled_bytes=8).faults


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_tiled_kernel_off_the_matrix_units_is_a_fault(arch):
    idle = replace(GOOD, arch=arch, matrix_instructions=0, products=0)
    assert "has no" in idle.faults[0]
    assert bool(replace(idle, operand="*fp32").faults) == (arch == "gfx942")
    assert not replace(idle, kernel="gradient_kernel", wide_loads=4).faults


def test_products_of_warpgroups_on_hopper_alone_where_tiles_have_the_rows():
    narrow = replace(GOOD, warpgroup_products=0)
    assert "warpgroup" in narrow.faults[0] and not replace(narrow, arch="sm_80").faults
    attention = replace(narrow, kernel="prefix_attention_kernel", blocks="64x64x128")
    assert "warpgroup" in attention.faults[0]
    assert not replace(attention, blocks="32x64x128").faults


def test_what_the_machine_code_lacks_is_a_fault():
    assert "local memory" in replace(GOOD, local_accesses=2).faults[0]
    assert "no product" in replace(GOOD, products=0).faults[0]
    assert "asynchronously" in replace(GOOD, async_copies_in_loops=0).faults[0]
    assert not replace(GOOD, arch="gfx942", async_copies_in_loops=0).faults
    narrow = replace(GOOD, kernel="gradient_kernel", wide_copies=0)
    assert "16 bytes" in narrow.faults[0]
    assert not replace(narrow, wide_loads=4).faults


def test_an_exception_excuses_what_it_names():
    unaligned = replace(GOOD, async_copies_in_loops=0, wide_copies=0, variant="bf16, all, odd D")
    assert not unaligned.faults and len(unaligned.exceptions) == 2
    assert len(replace(unaligned, variant="bf16, all").faults) == 2
    assert len(replace(unaligned, kernel="prefix_attention_kernel").faults) == 2
    assert replace(unaligned, local_accesses=2).faults, "which none excuses"
    assert not GOOD.exceptions


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [
        (32, 0, 4, 64),  # full
        (128, 0, 4, 16),  # 65,536 registers are 16 warps of 4,096
        (129, 0, 4, 12),  # one more, and a warp takes 4,352
        (255, 98_304, 8, 8),
        (32, 114_000, 4, 8),  # shared memory for two
        (32, 116_000, 4, 4),  # ... but for the 1 KiB that each program takes beyond
        (16, 0, 1, 32),  # 32 programs at most
    ],
)
def test_occupancy_of_hopper(registers, shared, warps, resident):
    assert cuda_resident_warps("sm_90", registers, shared, warps) == resident


def test_occupancy_by_tensor_memory():
    assert cuda_resident_warps("sm_100", 32, 0, 4, tensor_columns=256) == 8


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(64, 0, 4, 32), (65, 0, 4, 28), (242, 32_768, 8, 8), (400, 0, 4, 4), (64, 33_000, 4, 4)],
)
def test_occupancy_of_cdna3(registers, shared, warps, resident):
    assert cdna3_resident_warps(registers, shared, warps) == resident
