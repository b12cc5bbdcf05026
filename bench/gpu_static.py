"""What the GPU compilers make of every Triton kernel: registers, spills, shared memory, occupancy,
matrix instructions. Needs no GPU.

    python -m bench.gpu_static                       every kernel, every target, under 3 minutes
    python -m bench.gpu_static --arch sm_90 --only fused

The launchers of `esr_kernels` run on tensors without data, and every launch is compiled instead of
executed, with the specialisation that Triton's JIT gives it (alignment of pointers, divisibility of
strides) and the committed blocks. Exit code 1 for a fault of `Compiled.faults` that `EXCEPTIONS`
does not name, an exception that nothing needs, or a kernel of the list that was never launched.
`make static-all` does the same with the other Triton versions that are supported.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from bench.ahead_of_time import TARGETS, Launched, launches_compile
from bench.kernel_variants import KERNELS, VARIANTS
from bench.machine_code import (
    Code,
    code_of,
    is_async_copy,
    is_local,
    is_product,
    is_tensor_copy,
    is_warpgroup_product,
    is_wide_copy,
    is_wide_load,
    nvidia_tool,
)

MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
_MUST_NOT_SPILL = ("sm_90", "gfx942")
# Kernels that multiply tiles in a loop, whose loads are copies to shared memory, several stages
# ahead, and those of them with 64 rows of a tile and more, for which sm_90 has its widest products.
_TILED = (
    "fused_statistics_kernel",
    "fused_tiles_kernel",
    "prefix_attention_kernel",
    "suffix_attention_kernel",
)
_WARPGROUP_ROWS = 64
# Kernels whose time is that of reading logits.
_STREAMS = (
    "row_statistics_kernel",
    "pull_sums_kernel",
    "gradient_kernel",
    "unselected_statistics_kernel",
    "unselected_gradient_kernel",
    "tile_statistics_kernel",
)
# (what is wrong, kernel, part of the variant's name) -> why it may be.
EXCEPTIONS = {
    ("16 bytes", "merge_kernel", "rows"): "a lane reads the numbers of its row, 40 bytes apart",
    ("16 bytes", "draw_kernel", "sampling"): "one tile a row, which starts where a number says",
    ("16 bytes", "candidates_kernel", "bf16"): "four logits a thread, 8 bytes",
    ("16 bytes", "cutoff_kernel", "bf16"): "four logits a thread, 8 bytes",
    ("16 bytes", "cross_entropy_kernel", "odd D"): "rows that do not start at 16 bytes",
    ("16 bytes", "fused_statistics_kernel", "odd D"): "rows that do not start at 16 bytes",
    ("16 bytes", "fused_tiles_kernel", "odd D"): "rows that do not start at 16 bytes",
    ("asynchronously", "fused_statistics_kernel", "bf16, all, odd D"): "no copy has 2 bytes",
    ("asynchronously", "fused_tiles_kernel", "bf16, all, odd D"): "no copy has 2 bytes",
}
# Triton 3.4 moves four vector registers of gfx942 to accumulation registers and back. Registers
# spilled to memory would be accesses to local memory besides, which nothing excuses.
if triton.__version__.startswith("3.4."):
    _reason = "accumulation registers hold them, not memory"
    EXCEPTIONS["spills 16 bytes", "prefix_attention_kernel", "bf16, 32 rows"] = _reason
    EXCEPTIONS["spills 16 bytes", "prefix_attention_kernel", "fp16, all, D 64"] = _reason
_RESULTS = Path(__file__).parent / "results" / "gpu_static.json"


@dataclass(frozen=True)
class Compiled:
    """One kernel at one block for one target."""

    arch: str
    kernel: str
    variant: str
    operand: str  # type of the first pointer or descriptor
    blocks: str
    warps: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_bytes: int  # of a program
    resident_warps: int  # of one SM or CU
    occupancy: float  # resident warps over the most there can be
    matrix_instructions: int
    products: int  # instructions of the matrix units in the machine code
    wide_loads: int  # of 16 bytes a lane, from global memory into registers
    descriptors: int  # arguments that are tensor descriptors
    # From global to shared memory in the loop of products that has fewest; of those, the copies of
    # 16 bytes a lane or more, and those by descriptors.
    async_copies_in_loops: int
    wide_copies_in_loops: int
    tensor_copies_in_loops: int
    local_accesses: int  # loads and stores of spilled registers
    warpgroup_products: int  # of those products, Hopper's of a warpgroup
    wide_copies: int  # of 16 bytes a lane, from global to shared memory

    @property
    def _wrong(self) -> Iterator[str]:
        """What the kernel does and must not, and what its machine code must have and has not."""
        if self.arch in _MUST_NOT_SPILL:
            if self.spilled_bytes:
                yield f"spills {self.spilled_bytes} bytes a thread"
            if self.local_accesses:
                yield f"has {self.local_accesses} accesses to local memory"
        nvidia = self.arch != "gfx942"
        tiled = self.kernel in _TILED
        # No NVIDIA matrix unit multiplies full fp32.
        multiplies = tiled and (self.operand != "*fp32" or not nvidia)
        if multiplies and not self.matrix_instructions + self.products:
            yield f"has no {MATRIX_INSTRUCTION[self.arch]}"
        if multiplies and not self.products:
            yield "has no product in its machine code"
        attends = "attention" in self.kernel
        few_rows = attends and int(self.blocks.split("x")[0]) < _WARPGROUP_ROWS
        if multiplies and self.arch == "sm_90" and not few_rows and not self.warpgroup_products:
            yield "has no product of a warpgroup"
        if tiled and nvidia:
            if not self.async_copies_in_loops:
                yield "copies nothing asynchronously in a loop of products"
            if self.wide_copies_in_loops < self.async_copies_in_loops:
                yield "copies fewer than 16 bytes at once in a loop of products"
            if self.descriptors and not self.tensor_copies_in_loops:
                yield "has descriptors, and copies nothing by them in a loop of products"
        # On gfx942 a masked load is a branch, and narrow where the loop is short.
        if nvidia or tiled or self.kernel in _STREAMS:
            if not self.wide_loads + self.wide_copies:
                yield "loads no 16 bytes at once"

    @property
    def exceptions(self) -> list[tuple[str, str, str]]:
        """The keys of `EXCEPTIONS` that this needs."""
        return [
            key
            for key in EXCEPTIONS
            if key[1] == self.kernel
            and key[2] in self.variant
            and any(key[0] in wrong for wrong in self._wrong)
        ]

    @property
    def faults(self) -> list[str]:
        """Why this must not be shipped."""
        excepted = {key[0] for key in self.exceptions}
        return [
            f"{self.kernel} ({self.variant}) on {self.arch} {wrong}"
            for wrong in self._wrong
            if not any(what in wrong for what in excepted)
        ]


def cuda_resident_warps(
    arch: str, registers: int, shared: int, warps: int, tensor_columns: int = 0
) -> int:
    """Warps that one SM holds at once.

    Each of its 4 partitions has 16,384 registers, handed out to a warp in units of 256. A program
    takes 1 KiB of shared memory beyond its own. Tensor memory has 512 columns.
    """
    of_a_warp = -(-registers * 32 // 256) * 256
    programs = [
        16_384 // of_a_warp * 4 // warps,
        64 // warps,
        32,
        (164 if arch == "sm_80" else 228) * 1024 // (shared + 1024),
    ]
    if tensor_columns:
        programs.append(512 // tensor_columns)
    return min(programs) * warps


def cdna3_resident_warps(registers: int, shared: int, warps: int) -> int:
    """Waves that one CU holds at once.

    Each of its 4 SIMDs has 512 registers for every lane, handed out in units of 8, and holds at
    most 8 waves. LDS has 64 KiB.
    """
    waves = min(8, 512 // (-(-registers // 8) * 8)) * 4
    programs = [waves // warps, 32]
    if shared:
        programs.append(64 * 1024 // shared)
    return min(programs) * warps


def resources(kernel: Any) -> tuple[int, int, int]:
    """(registers and spilled bytes of a thread, columns of tensor memory) of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        return *_amd_resources(kernel.asm["amdgcn"]), 0
    text = nvidia_tool("--dump-resource-usage", cubin=kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, getattr(kernel.metadata, "tmem_size", None) or 0


def _amd_resources(assembly: str) -> tuple[int, int]:
    """(registers, spilled bytes) from the kernel's metadata."""

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the assembly has no .{name}")
        return int(found.group(1))

    # Scalar registers spill into lanes of vector registers, which costs no memory.
    spilled = max(field("private_segment_fixed_size"), 4 * field("vgpr_spill_count"))
    return field("vgpr_count"), spilled


def _flat(types: Iterable[Any]) -> Iterator[str]:
    """The types of a kernel's arguments; that of a tuple is a tuple of types."""
    for kind in types:
        if isinstance(kind, str):
            yield kind
        else:
            yield from _flat(kind)


def copies_in_loops(code: Code) -> tuple[int, int, int]:
    """(asynchronous copies, of those of 16 bytes a lane or more, of those by descriptors), each in
    the loop of products that has fewest."""

    def fewest(wanted: Callable[[str], bool]) -> int:
        return min((code.count(wanted, loop.body) for loop in code.product_loops), default=0)

    return fewest(is_async_copy), fewest(is_wide_copy), fewest(is_tensor_copy)


_DESCRIPTOR = re.compile(r"tensordesc<(\w+)")


def pointee(kind: str) -> str | None:
    """The type of the pointer that an argument is or, a tensor descriptor, holds."""
    described = _DESCRIPTOR.match(kind)
    if described:
        return "*" + described.group(1)
    return kind if kind.startswith("*") else None


def _measure(arch: str, variant: str, launched: Launched) -> Compiled:
    kernel = launched.kernel
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers, spilled, columns = resources(kernel)
    if arch == "gfx942":
        resident, most = cdna3_resident_warps(registers, shared, warps), 32
    else:
        resident, most = cuda_resident_warps(arch, registers, shared, warps, columns), 64
    assembly = kernel.asm["amdgcn" if arch == "gfx942" else "ptx"]
    code = code_of(kernel)
    copies, wide_copies, tensor_copies = copies_in_loops(code)
    blocks = [str(x) for name, x in launched.constants.items() if name.startswith("BLOCK")]
    types = list(_flat(kernel.src.signature.values()))
    return Compiled(
        arch=arch,
        kernel=launched.function.fn.__name__.lstrip("_"),
        variant=variant,
        operand=next(filter(None, map(pointee, types))),
        blocks="x".join(blocks),
        warps=warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        resident_warps=resident,
        occupancy=resident / most,
        matrix_instructions=len(re.findall(re.escape(MATRIX_INSTRUCTION[arch]), assembly)),
        products=code.count(is_product),
        wide_loads=code.count(is_wide_load),
        descriptors=sum(_DESCRIPTOR.match(kind) is not None for kind in types),
        async_copies_in_loops=copies,
        wide_copies_in_loops=wide_copies,
        tensor_copies_in_loops=tensor_copies,
        local_accesses=code.count(is_local),
        warpgroup_products=code.count(is_warpgroup_product),
        wide_copies=code.count(is_wide_copy),
    )


def compile_variants(arch: str, only: list[str]) -> Iterator[Compiled]:
    """Every distinct kernel launched by the variants whose name starts with one of `only`.

    An empty list selects all variants.
    """
    seen: list[object] = []
    for name, launch in VARIANTS.items():
        if only and not name.startswith(tuple(only)):
            continue
        with launches_compile(TARGETS[arch]) as launched:
            launch()
        for launch_of in launched:
            if not any(launch_of.kernel is other for other in seen):
                seen.append(launch_of.kernel)
                yield _measure(arch, name, launch_of)


_HEADER = (
    f"{'kernel':<28} {'variant':<28} {'blocks':>11} {'warps':>5} {'regs':>4} {'spill':>5} "
    f"{'shared':>7} {'resident':>8} {'occup.':>6} {'matrix':>6}"
)


def _line(row: Compiled) -> str:
    return (
        f"{row.kernel:<28} {row.variant:<28} {row.blocks:>11} {row.warps:>5} {row.registers:>4} "
        f"{row.spilled_bytes:>5} {row.shared_bytes:>7} {row.resident_warps:>8} "
        f"{row.occupancy:>6.0%} {row.matrix_instructions:>6}"
    )


def _by_arch(rows: list[Compiled]) -> dict[str, object]:
    """Triton's version, and arch -> kernel -> variant -> numbers."""
    results: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    for row in rows:
        numbers = asdict(row)
        arch, kernel, variant = (str(numbers.pop(key)) for key in ("arch", "kernel", "variant"))
        results.setdefault(arch, {}).setdefault(kernel, {})[variant] = numbers
    return {"triton": triton.__version__, **results}


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write the JSON, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument(
        "--only", action="append", default=[], help="variants whose name starts so, such as 'fused'"
    )
    parser.add_argument("--json", type=Path, help=f"default: {_RESULTS.name} for a whole run")
    options = parser.parse_args(arguments)
    whole = options.arch is None and not options.only
    rows: list[Compiled] = []
    for arch in options.arch or TARGETS:
        print(f"\n{arch}\n{_HEADER}", flush=True)
        for row in compile_variants(arch, options.only):
            print(_line(row), flush=True)
            rows.append(row)
    faults = [fault for row in rows for fault in row.faults]
    if not options.only:
        launched = {row.kernel for row in rows}
        faults += [f"{name} was never launched" for name in KERNELS if name not in launched]
        faults += [f"{name} is not in KERNELS" for name in launched if name not in KERNELS]
    if whole:
        needed = {key for row in rows for key in row.exceptions}
        faults += [f"no kernel needs the exception {key}" for key in EXCEPTIONS.keys() - needed]
    target = options.json or (_RESULTS if whole else None)
    if target is not None:
        target.write_text(json.dumps(_by_arch(rows), indent=1) + "\n")
    print()
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
