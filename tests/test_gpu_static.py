"""What the static gate of the GPU kernels lets through, and that today's kernels pass it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from triton.runtime.jit import KernelInterface

import esr_kernels
from bench.gpu_static import (
    Compiled,
    cdna3_resident_warps,
    copies_in_loops,
    cuda_resident_warps,
    pointee,
)
from bench.kernel_variants import KERNELS
from bench.machine_code import read_sass
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
    descriptors=4,
    async_copies_in_loops=2,
    wide_copies_in_loops=2,
    tensor_copies_in_loops=2,
    local_accesses=0,
    warpgroup_products=8,
    wide_copies=8,
)
# Fills shared memory ahead of a loop of products, and in it where `COPY` copies.
LOOP = """
        /*0000*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;
        /*0020*/                   COPY ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/                   FADD R1, R1, R2 ;
        /*00a0*/              @!P0 BRA 0x20 ;
        /*00b0*/              @!P1 BRA 0x0 ;
        /*00c0*/                   EXIT ;
"""


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
    # Both operands of both models, whose two loops of products load a block of each.
    assert fused["descriptors"] == 4 and fused["operand"] == "*fp16"
    assert fused["tensor_copies_in_loops"] == fused["async_copies_in_loops"] == 2
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
    none = dict.fromkeys(("async", "wide", "tensor"), 0)
    bare = replace(GOOD, **{f"{kind}_copies_in_loops": n for kind, n in none.items()})
    assert "asynchronously" in bare.faults[0]
    assert not replace(bare, arch="gfx942").faults
    assert "by them" in replace(GOOD, tensor_copies_in_loops=0).faults[0]
    assert not replace(GOOD, tensor_copies_in_loops=0, descriptors=0).faults
    assert "fewer than 16 bytes" in replace(GOOD, wide_copies_in_loops=1).faults[0]
    narrow = replace(GOOD, kernel="gradient_kernel", wide_copies=0)
    assert "16 bytes" in narrow.faults[0]
    assert not replace(narrow, wide_loads=4).faults


@pytest.mark.parametrize(
    ("instruction", "copies"),
    [
        ("UTMALDG.2D [UR8], [UR4]", (1, 1, 1)),
        ("LDGSTS.E.BYPASS.128 [R1], [R2]", (1, 1, 0)),
        ("LDGSTS.E [R1], [R2]", (1, 0, 0)),
        ("LDG.E.128 R4, [R2]", (0, 0, 0)),
        ("NOP", (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("product", ["HGMMA.64x128x16.F32.BF16", "FFMA"])
def test_copies_count_in_the_loop_of_products(instruction, copies, product):
    listing = LOOP.replace("COPY", instruction).replace("HGMMA.64x128x16.F32.BF16", product)
    code = read_sass(listing.replace("FADD", "FFMA") if product == "FFMA" else listing)
    assert copies_in_loops(code) == copies


def test_code_without_a_loop_of_products_copies_nothing_in_one():
    assert copies_in_loops(read_sass(LOOP.replace("HGMMA", "FADD"))) == (0, 0, 0)


def test_the_loop_with_the_fewest_copies_counts():
    first = LOOP.replace("COPY", "UTMALDG.2D [UR8], [UR4]").replace("EXIT", "NOP")
    second = LOOP.replace("COPY", "LDG.E.128 R4, [R2]").replace("/*00", "/*01")
    second = re.sub(r"BRA 0x(\w+)", lambda to: f"BRA {int(to.group(1), 16) + 256:#x}", second)
    first += "        /*00d0*/                   NOP ;\n"
    code = read_sass(first + second)
    assert len(code.product_loops) == 2
    assert copies_in_loops(code) == (0, 0, 0)


def test_the_operand_of_a_descriptor_is_what_it_describes():
    """By its type a kernel must have products of the matrix units."""
    assert pointee("tensordesc<bf16[128, 64]>") == pointee("*bf16") == "*bf16"
    assert pointee("i32") is pointee("constexpr") is None


def test_an_exception_excuses_what_it_names():
    unaligned = replace(
        GOOD,
        variant="bf16, all, odd D",
        descriptors=0,
        async_copies_in_loops=0,
        wide_copies_in_loops=0,
        tensor_copies_in_loops=0,
        wide_copies=0,
    )
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
