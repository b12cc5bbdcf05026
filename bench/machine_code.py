"""What a compiled kernel consists of: its instructions, its loops, and what a program issues.

NVIDIA's code is read from cuobjdump's listing (the tool comes with Triton), AMD's from the assembly
that Triton keeps. A loop is natural: an edge back to a block that dominates its source, so that the
out-of-line waits of Blackwell's code, which jump back into the middle, are none.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import triton

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][A-Z0-9_.]*)([^;]*);")
_AMD = re.compile(r"^\s+([a-z]+_\w+)(.*)$")
_LABEL = re.compile(r"^(\.LBB\w+):")
_PRODUCTS = ("HGMMA", "UTCHMMA", "UTCMMA", "HMMA", "v_mfma")
_WIDE_LOADS = ("LDG.E.128", "LDG.E.EF.128", "global_load_dwordx4", "buffer_load_dwordx4")
_TENSOR_COPIES = ("UTMALDG",)
_ASYNC = ("LDGSTS", "UBLKCP", *_TENSOR_COPIES)
_LOCAL = ("LDL", "STL", "scratch_load", "scratch_store")


class Instruction(NamedTuple):
    opcode: str
    target: int | None  # index of the instruction that it may jump to
    falls_through: bool


@dataclass(frozen=True)
class Loop:
    """Instructions of a loop, those of the loops inside it included."""

    body: frozenset[int]
    inner: bool  # holds no other loop


def _starts_with(prefixes: Iterable[str]) -> Callable[[str], bool]:
    chosen = tuple(prefixes)
    return lambda opcode: opcode.startswith(chosen)


is_product = _starts_with(_PRODUCTS)
is_wide_load = _starts_with(_WIDE_LOADS)
is_async_copy = _starts_with(_ASYNC)
is_tensor_copy = _starts_with(_TENSOR_COPIES)  # of a tile, by its descriptor
is_local = _starts_with(_LOCAL)
_is_fp32_product = _starts_with(("FFMA",))
is_warpgroup_product = _starts_with(("HGMMA",))


def is_wide_copy(opcode: str) -> bool:
    """An asynchronous copy of 16 bytes a lane, or of a whole tile."""
    return is_async_copy(opcode) and (".128" in opcode or not opcode.startswith("LDGSTS"))


def is_load(opcode: str) -> bool:
    """A load from global memory into registers."""
    return opcode.startswith(("LDG.", "global_load", "buffer_load"))


@dataclass(frozen=True)
class Code:
    """One kernel's instructions in the order of their addresses."""

    instructions: tuple[Instruction, ...]

    def count(self, wanted: Callable[[str], bool], body: Iterable[int] | None = None) -> int:
        """How many instructions are wanted, in `body` or in all."""
        where = range(len(self.instructions)) if body is None else body
        return sum(wanted(self.instructions[at].opcode) for at in where)

    def opcodes(self, body: Iterable[int]) -> Counter[str]:
        """How often each opcode, without its modifiers, stands in `body`."""
        return Counter(self.instructions[at].opcode.split(".")[0] for at in body)

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """In the order of their first instructions. Loops that only wait for a barrier are none."""
        starts, successors = self._blocks()
        dominators = _dominators(successors)
        bodies: dict[int, set[int]] = {}
        for source, targets in enumerate(successors):
            for target in targets:
                if target in dominators[source]:
                    body = bodies.setdefault(target, {target})
                    body |= _reaching(source, target, successors)
        ends = [*starts[1:], len(self.instructions)]
        instructions = {
            header: frozenset(at for block in blocks for at in range(starts[block], ends[block]))
            for header, blocks in sorted(bodies.items())
        }
        real = [body for body in instructions.values() if len(body) > _WAITING]
        loops = [Loop(body, not any(other < body for other in real)) for body in real]
        return tuple(loops)

    @cached_property
    def product_loops(self) -> tuple[Loop, ...]:
        """Innermost loops that multiply tiles: on matrix units, or, in code without any of their
        instructions, by the fp32 multiply-adds that are a fifth of the loop's and more."""
        inner = [loop for loop in self.loops if loop.inner]
        if self.count(is_product):
            return tuple(loop for loop in inner if self.count(is_product, loop.body))
        return tuple(x for x in inner if 5 * self.count(_is_fp32_product, x.body) >= len(x.body))

    def _blocks(self) -> tuple[list[int], list[list[int]]]:
        """(first instruction, successors) of every basic block."""
        leaders = {0}
        for at, instruction in enumerate(self.instructions):
            if instruction.target is not None:
                leaders.add(instruction.target)
            if instruction.target is not None or not instruction.falls_through:
                leaders.add(at + 1)
        starts = sorted(leader for leader in leaders if leader < len(self.instructions))
        block_of = {start: block for block, start in enumerate(starts)}
        successors: list[list[int]] = []
        for block, end in enumerate([*starts[1:], len(self.instructions)]):
            instruction = self.instructions[end - 1]
            after = []
            if instruction.target is not None and instruction.target in block_of:
                after.append(block_of[instruction.target])
            if instruction.falls_through and block + 1 < len(starts):
                after.append(block + 1)
            successors.append(after)
        return starts, successors


# A loop of so few instructions waits for a barrier.
_WAITING = 8


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """Of each block, the blocks on every way to it from the first."""
    count = len(successors)
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for source, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(source)
    everything = set(range(count))
    dominators = [{0}, *(set(everything) for _ in range(count - 1))]
    changed = True
    while changed:
        changed = False
        for block in range(1, count):
            known = [dominators[other] for other in predecessors[block]]
            found = (set.intersection(*known) if known else set()) | {block}
            if found != dominators[block]:
                dominators[block], changed = found, True
    return dominators


def _reaching(source: int, header: int, successors: list[list[int]]) -> set[int]:
    """Blocks from which `source` is reached without passing `header`."""
    predecessors: dict[int, list[int]] = {}
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors.setdefault(target, []).append(block)
    found, waiting = {header}, [source]
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting.extend(predecessors.get(block, ()))
    return found


def read_sass(listing: str) -> Code:
    """The one kernel of a listing by `cuobjdump -sass`."""
    found = _SASS.findall(listing)
    index = {int(address, 16): at for at, (address, *_) in enumerate(found)}
    instructions = []
    for _, predicate, opcode, operands in found:
        target, falls = None, True
        if opcode.startswith("BRA"):
            places = re.findall(r"0x[0-9a-f]+", operands)
            target = index.get(int(places[-1], 16)) if places else None
            falls = bool(predicate) or "," in operands
        elif opcode.startswith(("EXIT", "RET")):
            falls = bool(predicate)
        instructions.append(Instruction(opcode, target, falls))
    return Code(tuple(instructions))


def read_amd(assembly: str) -> Code:
    """The one kernel of an assembly file by LLVM."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in assembly.split(".section")[0].splitlines():
        label, instruction = _LABEL.match(line), _AMD.match(line)
        if label:
            labels[label.group(1)] = len(found)
        elif instruction:
            found.append((instruction.group(1), instruction.group(2)))
    instructions = []
    for opcode, operands in found:
        jumps = opcode.startswith(("s_branch", "s_cbranch"))
        target = labels.get(operands.split(";")[0].strip()) if jumps else None
        instructions.append(Instruction(opcode, target, opcode not in ("s_branch", "s_endpgm")))
    return Code(tuple(instructions))


def nvidia_tool(*arguments: str, cubin: bytes) -> str:
    """What cuobjdump prints about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code_of(kernel: Any) -> Code:
    """The machine code of a kernel that Triton has compiled."""
    if "cubin" in kernel.asm:
        return read_sass(nvidia_tool("-sass", cubin=kernel.asm["cubin"]))
    return read_amd(kernel.asm["amdgcn"])
