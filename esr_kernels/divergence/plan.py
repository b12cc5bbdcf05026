"""A plan to compute a divergence, and what it costs in bytes, FLOPs and memory traffic.

stash      Chunks of tokens. Both models' logits of a chunk exist at once; their gradient replaces
           them and is used by the two gradient GEMMs immediately. 4 GEMMs, none repeated.
recompute  The forward stores a few floats a token. The backward projects one tile of classes after
           another again, and writes each tile of the weight gradient once. 6 GEMMs (8 where the
           divergence takes two passes), little memory, any upstream gradient.
fused      A recompute whose forward is one Triton kernel, projections and statistics: no logits in
           memory. For calls without gradients, and if its GEMMs, which are slower than the
           vendor's, cost less than writing logits and reading them back.

`planner` chooses among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from esr_kernels.common.calibration import rates_of
from esr_kernels.common.launch import split_columns
from esr_kernels.common.matmul import strip_rows
from esr_kernels.common.workspace import row_stride

MIB = 1 << 20
KINDS = ("stash", "recompute", "fused")
# FLOPs that a CPU core with AVX2 does in the time that one byte takes to move; of a GPU see
# `calibration.Rates`.
_CPU_FLOPS_PER_BYTE = 8.0
# With fewer classes or tokens in a tile, a GEMM runs far below its usual rate.
SMALLEST_TILE = 64
# A chunk of tokens on a GPU is a multiple of this. Its GEMMs fill their tiles of up to 256 rows,
# and buffers, gigabytes of them, keep a few sizes however the number of tokens varies: those that
# varied with it would leave holes in the allocator's cache.
ROW_STEP = 256
# Blocks of PyTorch's row passes: probabilities of both models, temporaries of two-pass divergences.
_TORCH_SCRATCH = 4 * 5 * 640_000
# Numbers a token that a merged class takes besides its members' logits, and the block that the
# derivative of a softcap takes then (PyTorch's row passes have room for it).
_MERGED_COLUMNS, _MERGED_SCRATCH = 30, 4 * 640_000
# As in `fused_triton`: the tokens of a tile, the token blocks that walk the classes side by side,
# and the programs wanted, up to five times as many where that fills the last round. A GPU runs
# about 128 at once.
_FUSED_TILE, _FUSED_GROUP, _FUSED_PROGRAMS, _FUSED_WAVE = 128, 8, 512, 128
_FUSED_MOST_TIMES = 5
# Bytes of a token's statistics from one split of the classes, and of merging them.
_PART_BYTES = 2 * 4 * 10
# Classes of a split of the row passes at least: with Triton before 3.7.
_NARROWEST_BLOCK = 512


@dataclass(frozen=True)
class Problem:
    """The sizes that decide a plan. `classes` is the number that both models share."""

    tokens: int
    classes: int
    student_dim: int
    teacher_dim: int
    hidden_dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    train_hidden: bool = True
    train_weight: bool = True
    two_pass: bool = False
    per_token_gradient: bool = False
    sharded: bool = False
    mapped: bool = False
    weight_grad_given: bool = False  # the head's gradient is added to a buffer of the caller
    train_bias: bool = False
    merged: tuple[int, int] = (0, 0)  # classes of student and teacher that are merged into one
    rows: str = "triton"  # what computes the row passes: "triton", "torch" or "native" (C, on CPU)

    @property
    def logit_bytes(self) -> int:
        return 8 if self.hidden_dtype == torch.float64 else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one element of dz: in the operands' dtype on GPU, the logits' on CPU."""
        return self.logit_bytes if self.device == "cpu" else self.hidden_dtype.itemsize

    @property
    def weight_gradient_bytes(self) -> int:
        """Bytes of one element of the buffer for the head's gradient."""
        return self.logit_bytes if self.weight_grad_given else self.weight_dtype.itemsize

    @cached_property
    def in_place(self) -> bool:
        """Whether dz can take the place of the student's logits."""
        return self.gradient_bytes == self.logit_bytes

    @property
    def needs_gradient(self) -> bool:
        return self.train_hidden or self.train_weight or self.train_bias


@dataclass(frozen=True)
class Plan:
    """One way to compute a `Problem`.

    token_chunk: tokens whose dz exists at once; logit_chunk: tokens whose logits are projected at
    once (stash); either may be a little more than there are tokens, and buffers have that size.
    vocab_chunk: classes in a tile (recompute, backward of fused). extra_bytes is the
    predicted peak beyond the inputs and the returned gradients; on CPU the buffers stay for the
    next call (`release_workspace`).
    """

    kind: str
    problem: Problem
    token_chunk: int
    logit_chunk: int
    vocab_chunk: int

    @property
    def extra_bytes(self) -> int:
        p = self.problem
        scratch = _TORCH_SCRATCH if p.device == "cpu" and p.rows == "torch" else 0
        if self.kind == "stash":
            buffers = int(not p.in_place) + int(not self.teacher_in_gradient)
            row = row_stride(p.classes)
            logits = self.logit_chunk * row * p.logit_bytes * buffers
            dz = self.token_chunk * row * p.gradient_bytes
            buffers_of_call = self._accumulator_bytes + self._gathered_bytes + self._merged_bytes
            return logits + dz + buffers_of_call + scratch
        tile = 2 * p.logit_bytes if self._has_tiles else 0
        if p.needs_gradient and not p.in_place:
            tile += p.gradient_bytes
        parts = self._fused_splits if self.kind == "fused" else self._tile_splits
        by_token = p.tokens * (self.vocab_chunk * tile + parts * _PART_BYTES)
        buffers_of_call = self._accumulator_bytes + self._gathered_bytes + self._merged_bytes
        return by_token + buffers_of_call + scratch

    @property
    def _has_tiles(self) -> bool:
        """Whether any pass reads logits from memory (all kinds but a fused one-pass forward)."""
        return self.kind != "fused" or self.problem.needs_gradient or self.problem.two_pass

    @property
    def _fused_splits(self) -> int:
        """Splits of the classes over programs, of the narrowest tile: an upper bound."""
        programs = math.ceil(self.problem.tokens / _FUSED_TILE)
        tiles = math.ceil(self.problem.classes / SMALLEST_TILE)
        return min(tiles, _FUSED_MOST_TIMES * max(1, _FUSED_PROGRAMS // max(programs, 1)))

    @property
    def _tile_splits(self) -> int:
        """Splits of the classes of all tiles, whose statistics are held until they are merged."""
        if self.problem.rows != "triton":
            return 0  # one a tile, which does not count
        tokens, classes = max(1, self.problem.tokens), self.problem.classes
        splits, _ = split_columns(tokens, self.vocab_chunk, _NARROWEST_BLOCK)
        return math.ceil(classes / self.vocab_chunk) * splits

    @cached_property
    def sums_hidden_apart(self) -> bool:
        """Whether a stash sums the hidden gradient in an fp32 buffer before it takes its dtype.

        fp16 is scaled back there, and a merged class adds to it after the last chunk.
        """
        p = self.problem
        return p.hidden_dtype.itemsize < 4 and (p.hidden_dtype == torch.float16 or any(p.merged))

    @cached_property
    def sums_weight_apart(self) -> bool:
        """Whether the weight gradient is summed in an fp32 buffer before it takes its dtype."""
        p = self.problem
        narrow = p.weight_gradient_bytes < 4
        return narrow and (self.token_chunk < p.tokens or p.hidden_dtype == torch.float16)

    @cached_property
    def teacher_in_gradient(self) -> bool:
        """Whether the teacher's logits can lie in the memory of the weight gradient.

        That memory is unused until the gradient is written: after the last row pass if all tokens
        are one chunk, or at the end if the sum has a buffer of its own.
        """
        p = self.problem
        idle = self.token_chunk >= p.tokens or self.sums_weight_apart
        room = p.classes * p.student_dim * p.weight_gradient_bytes
        fits = self.logit_chunk * row_stride(p.classes) * p.logit_bytes <= room
        return p.train_weight and not p.mapped and idle and fits

    @property
    def _accumulator_bytes(self) -> int:
        p = self.problem
        if self.kind == "stash":
            apart = p.train_weight and self.sums_weight_apart
            weight = p.classes * p.student_dim * 4 if apart else 0
            if p.train_weight and p.weight_grad_given:
                # Holds the gradient until the upstream factor is known; it is not returned.
                weight += p.classes * p.student_dim * p.weight_gradient_bytes
            apart = p.train_hidden and self.sums_hidden_apart
            return weight + (p.tokens * p.student_dim * 4 if apart else 0)
        narrow = p.hidden_dtype.itemsize < 4
        return p.tokens * p.student_dim * 4 if p.train_hidden and narrow else 0

    @property
    def _merged_bytes(self) -> int:
        """The biases that remove the members, their logits and their rows of the heads."""
        p, (student, teacher) = self.problem, self.problem.merged
        if not student:
            return 0
        vectors = p.classes * (3 * p.logit_bytes + 3)
        logits = p.tokens * p.logit_bytes * (4 * student + 2 * teacher + _MERGED_COLUMNS)
        rows = student * p.student_dim * (p.weight_dtype.itemsize + p.logit_bytes)
        rows += teacher * p.teacher_dim * p.weight_dtype.itemsize
        block = _MERGED_SCRATCH if self.kind == "stash" and p.rows == "native" else 0
        return vectors + logits + rows + block

    @property
    def _gathered_bytes(self) -> int:
        """A strip of a mapped head, or of its gradient, and the sum over strips of hidden
        gradients."""
        p = self.problem
        if not p.mapped:
            return 0
        classes = p.classes if self.kind == "stash" else min(self.vocab_chunk, p.classes)
        strips = [
            strip_rows(classes, dim, p.device) * dim * p.weight_dtype.itemsize
            for dim in (p.student_dim, p.teacher_dim)
        ]
        own = strip_rows(classes, p.student_dim, p.device) * p.student_dim
        if p.train_hidden:
            tokens = self.token_chunk if self.kind == "stash" else p.tokens
            strips.append(strips[0] + tokens * p.student_dim * p.logit_bytes)
        if p.train_weight:
            # Beside the strip, index_add_ takes no copy.
            strips.append(own * (4 if self.sums_weight_apart else p.weight_gradient_bytes))
        return max(strips)

    @property
    def gemm_flops(self) -> int:
        p = self.problem
        unit = 2 * p.tokens * p.classes
        project = p.student_dim + p.teacher_dim
        gradients = p.student_dim * (int(p.train_hidden) + int(p.train_weight))
        if self.kind == "stash":
            projections = 1
        else:
            projections = 1 + int(p.two_pass) + int(p.needs_gradient)
        return unit * (projections * project + gradients)

    @property
    def bytes_moved(self) -> int:
        """Main-memory traffic: row passes, and the operands of every GEMM call."""
        p = self.problem
        elements = p.tokens * p.classes
        heads = p.classes * (p.student_dim + p.teacher_dim) * p.weight_dtype.itemsize
        student_head = p.classes * p.student_dim * p.weight_dtype.itemsize
        logits, dz = 2 * p.logit_bytes, p.gradient_bytes
        written_and_read = 2 * logits + (logits if p.two_pass else 0)
        gradient_reads = dz * (int(p.train_hidden) + int(p.train_weight))
        if self.kind == "stash":
            updates, rest = divmod(p.tokens, self.token_chunk)
            calls = updates * math.ceil(self.token_chunk / self.logit_chunk)
            calls = max(1, calls + math.ceil(rest / self.logit_chunk))
            updates = max(1, updates + int(rest > 0))
            # Statistics read both logits, the gradient pass reads them again and writes dz.
            row = written_and_read + logits + dz + gradient_reads
            weight_traffic = calls * heads + updates * int(p.train_hidden) * student_head
            passes = 2 * updates - 1 + 3 * int(p.weight_grad_given)
            accumulate = p.classes * p.student_dim * 4 * passes * int(p.train_weight)
            return elements * row + weight_traffic + accumulate
        tiles = math.ceil(p.classes / self.vocab_chunk) if p.classes else 1
        hidden = p.tokens * (p.student_dim + p.teacher_dim) * p.hidden_dtype.itemsize
        pass_from_memory = elements * 2 * logits + tiles * hidden + heads
        total = pass_from_memory * int(p.two_pass)
        if self.kind == "fused":
            # Programs that run at once over the same split share its heads in the cache.
            programs = math.ceil(p.tokens / _FUSED_TILE)
            splits = max(1, _FUSED_PROGRAMS // max(programs, 1))
            rounds = math.ceil(programs / max(_FUSED_GROUP, _FUSED_WAVE // splits))
            total += rounds * heads + hidden + p.tokens * _PART_BYTES * self._fused_splits
        else:
            total += pass_from_memory
        if p.needs_gradient:
            total += elements * (2 * logits + dz + gradient_reads) + tiles * hidden + 2 * heads
            total += tiles * 2 * 4 * p.tokens * p.student_dim * int(p.train_hidden)
            total += p.classes * p.student_dim * 4 * int(p.weight_grad_given)
        return total

    @property
    def cost(self) -> float:
        """Roofline cost in units of bytes: comparable between plans on one machine only."""
        p = self.problem
        if p.device == "cpu":
            return self.gemm_flops / _CPU_FLOPS_PER_BYTE + self.bytes_moved
        rates, _ = rates_of(p.device)
        flops: float = self.gemm_flops
        epilogue = 0.0
        if self.kind == "fused":
            fused = 2 * p.tokens * p.classes * (p.student_dim + p.teacher_dim)
            flops += fused * (1 / rates.fused_rate - 1)
            epilogue = rates.fused_epilogue * p.tokens * p.classes
        return flops / rates.flops_per_byte + epilogue + self.bytes_moved

    def __str__(self) -> str:
        p = self.problem
        floor = 2 * p.tokens * p.classes * (p.student_dim + p.teacher_dim)
        floor += (
            2 * p.tokens * p.classes * p.student_dim * (int(p.train_hidden) + int(p.train_weight))
        )
        rates = "" if p.device == "cpu" else f"; rates {rates_of(p.device)[1]}"
        if self.kind == "stash":
            chunks = f"{self.token_chunk} tokens a chunk, {self.logit_chunk} projected at once"
        elif self._has_tiles:
            chunks = f"{self.vocab_chunk} classes a tile"
        else:
            chunks = "no logits in memory"
        return (
            f"{self.kind}: {chunks}; "
            f"extra memory {self.extra_bytes / MIB:.0f} MiB; "
            f"GEMMs {self.gemm_flops / 1e9:.1f} GFLOP (floor {floor / 1e9:.1f}); "
            f"traffic {self.bytes_moved / 1e9:.2f} GB{rates}"
        )


def padded_tokens(tokens: int, device: str) -> int:
    """The rows of a chunk that holds all tokens."""
    if device == "cpu" or tokens <= ROW_STEP:
        return max(tokens, 1)
    return -(-tokens // ROW_STEP) * ROW_STEP


def merged_sizes(merge: tuple[tuple[int, ...], tuple[int, ...]] | None) -> tuple[int, int]:
    """`Problem.merged` of a call."""
    return (0, 0) if merge is None else (len(merge[0]), len(merge[1]))
