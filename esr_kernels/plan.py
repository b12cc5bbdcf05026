"""How a divergence is computed within a budget of bytes, and what that costs.

stash      Chunks of tokens. Both models' logits of a chunk exist at once; their gradient replaces
           them and goes through the two gradient GEMMs immediately. 4 GEMMs, none repeated.
recompute  The forward keeps a few floats a token. The backward walks tiles of classes, projects
           them again, and writes each tile of the weight gradient once. 6 GEMMs (8 where the
           divergence takes two passes), tiny memory, any upstream gradient.

Every candidate chunking that fits the budget is priced by a roofline sum, FLOPs over the machine's
rate plus bytes over its bandwidth, and the cheapest wins. Nothing here depends on a launcher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

MIB = 1 << 20
_KINDS = ("stash", "recompute")
# FLOPs done in the time that one byte takes to move: H100-class GPU, and a CPU core with AVX2.
_FLOPS_PER_BYTE = {"cuda": 250.0, "cpu": 8.0}
_DEFAULT_BUDGET = {"cuda": 2048 * MIB, "cpu": 320 * MIB}
# Below this many classes or tokens in a tile a GEMM is no longer a GEMM.
_SMALLEST_TILE = 64
# Blocks of the CPU row passes: probabilities of both models, and the temporaries of two-pass ones.
_CPU_SCRATCH = 4 * 5 * 640_000


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

    @property
    def logit_bytes(self) -> int:
        return 8 if self.hidden_dtype == torch.float64 else 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one element of dz: rounded to the operands' dtype on GPU, kept on CPU."""
        return self.logit_bytes if self.device == "cpu" else self.hidden_dtype.itemsize

    @property
    def in_place(self) -> bool:
        """Whether dz can take the place of the student's logits."""
        return self.gradient_bytes == self.logit_bytes

    @property
    def needs_gradient(self) -> bool:
        return self.train_hidden or self.train_weight


@dataclass(frozen=True)
class Plan:
    """One way to compute a `Problem`.

    token_chunk: tokens whose dz exists at once; logit_chunk: tokens whose logits are projected at
    once (stash); vocab_chunk: classes in a tile (recompute). extra_bytes is the predicted peak
    beyond the inputs and the returned gradients; on CPU the buffers stay for the next call
    (`release_workspace`).
    """

    kind: str
    problem: Problem
    token_chunk: int
    logit_chunk: int
    vocab_chunk: int

    @property
    def extra_bytes(self) -> int:
        p = self.problem
        scratch = _CPU_SCRATCH if p.device == "cpu" else 0
        if self.kind == "stash":
            buffers = int(not p.in_place) + int(not self.teacher_in_gradient)
            logits = self.logit_chunk * p.classes * p.logit_bytes * buffers
            dz = self.token_chunk * p.classes * p.gradient_bytes
            return logits + dz + self._accumulator_bytes + scratch
        tile = p.tokens * self.vocab_chunk * (2 * p.logit_bytes)
        if p.needs_gradient and not p.in_place:
            tile += p.tokens * self.vocab_chunk * p.gradient_bytes
        return tile + self._accumulator_bytes + scratch

    @property
    def sums_weight_apart(self) -> bool:
        """Whether the weight gradient is summed in an fp32 buffer before it takes its dtype."""
        p = self.problem
        narrow = p.weight_dtype.itemsize < 4
        return narrow and (self.token_chunk < p.tokens or p.hidden_dtype == torch.float16)

    @property
    def teacher_in_gradient(self) -> bool:
        """Whether the teacher's logits can lie in the memory of the weight gradient.

        That memory is idle until the gradient is written: after the last row pass where all tokens
        are one chunk, or at the very end where the sum is kept apart.
        """
        p = self.problem
        idle = self.token_chunk >= p.tokens or self.sums_weight_apart
        room = p.student_dim * p.weight_dtype.itemsize // p.logit_bytes  # rows of logits
        return p.train_weight and not p.mapped and idle and self.logit_chunk <= room

    @property
    def _accumulator_bytes(self) -> int:
        p = self.problem
        if self.kind == "stash":
            apart = p.train_weight and self.sums_weight_apart
            weight = p.classes * p.student_dim * 4 if apart else 0
            fp16 = p.hidden_dtype == torch.float16
            return weight + (p.tokens * p.student_dim * 4 if p.train_hidden and fp16 else 0)
        narrow = p.hidden_dtype.itemsize < 4
        return p.tokens * p.student_dim * 4 if p.train_hidden and narrow else 0

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
            calls = math.ceil(p.tokens / self.logit_chunk) if p.tokens else 1
            updates = math.ceil(p.tokens / self.token_chunk) if p.tokens else 1
            # Statistics read both logits, the gradient pass reads them again and writes dz.
            row = written_and_read + logits + dz + gradient_reads
            weight_traffic = calls * heads + updates * int(p.train_hidden) * student_head
            accumulate = p.classes * p.student_dim * 4 * (2 * updates - 1) * int(p.train_weight)
            return elements * row + weight_traffic + accumulate
        tiles = math.ceil(p.classes / self.vocab_chunk) if p.classes else 1
        hidden = p.tokens * (p.student_dim + p.teacher_dim) * p.hidden_dtype.itemsize
        forward_passes = 1 + int(p.two_pass)
        total = forward_passes * (elements * 2 * logits + tiles * hidden + heads)
        if p.needs_gradient:
            total += elements * (2 * logits + dz + gradient_reads) + tiles * hidden + 2 * heads
            total += tiles * 2 * 4 * p.tokens * p.student_dim * int(p.train_hidden)
        return total

    @property
    def cost(self) -> float:
        """Roofline price in units of bytes: comparable between plans on one machine only."""
        return self.gemm_flops / _FLOPS_PER_BYTE[_family(self.problem.device)] + self.bytes_moved

    def __str__(self) -> str:
        p = self.problem
        floor = 2 * p.tokens * p.classes * (p.student_dim + p.teacher_dim)
        floor += (
            2 * p.tokens * p.classes * p.student_dim * (int(p.train_hidden) + int(p.train_weight))
        )
        if self.kind == "stash":
            chunks = f"{self.token_chunk} tokens a chunk, {self.logit_chunk} projected at once"
        else:
            chunks = f"{self.vocab_chunk} classes a tile"
        return (
            f"{self.kind}: {chunks}; "
            f"extra memory {self.extra_bytes / MIB:.0f} MiB; "
            f"GEMMs {self.gemm_flops / 1e9:.1f} GFLOP (floor {floor / 1e9:.1f}); "
            f"traffic {self.bytes_moved / 1e9:.2f} GB"
        )


def _family(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"


def default_memory_budget(device: str) -> int:
    """Bytes that a divergence may take beyond its inputs and gradients when nobody says."""
    return _DEFAULT_BUDGET[_family(device)]


def make_plan(problem: Problem, kind: str = "auto", memory_budget: int | None = None) -> Plan:
    """The cheapest plan of `kind` ("auto", "stash", "recompute") within `memory_budget` bytes.

    Raises ValueError where the kind is unknown, cannot serve the problem, or needs more bytes.
    """
    if kind != "auto" and kind not in _KINDS:
        raise ValueError(f"plan must be 'auto', 'stash' or 'recompute', got {kind!r}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    if kind == "stash" and problem.per_token_gradient:
        raise ValueError(
            "plan='stash' computes the gradient in the forward pass and cannot serve "
            "reduction='none'; use plan='recompute', or pass token_weights and reduce"
        )
    if kind == "stash" and problem.sharded:
        raise ValueError("plan='stash' does not shard the vocabulary; use plan='recompute'")
    budget = default_memory_budget(problem.device) if memory_budget is None else memory_budget
    # A forward without gradients has nothing to stash.
    may_stash = problem.needs_gradient and not (problem.per_token_gradient or problem.sharded)
    kinds = _KINDS if kind == "auto" else (kind,)
    candidates = [
        plan
        for name in kinds
        if name == "recompute" or may_stash
        for plan in (_stash_plans(problem) if name == "stash" else _recompute_plans(problem))
    ]
    if kind == "stash" and not candidates:
        candidates = _recompute_plans(problem)
    fitting = [plan for plan in candidates if plan.extra_bytes <= budget]
    if fitting:
        return min(fitting, key=lambda plan: plan.cost)
    smallest = min(candidates, key=lambda plan: plan.extra_bytes)
    if memory_budget is None:
        return smallest
    raise ValueError(
        f"memory_budget of {budget} bytes is too small for plan={kind!r}: "
        f"the smallest needs {smallest.extra_bytes} bytes"
    )


def _even_chunks(size: int, smallest: int) -> list[int]:
    """Chunk sizes for 1, 2, 3, 4, 6, 8, 12, 16, ... even chunks, down to about `smallest`."""
    chunks = [max(size, 1)]
    for doubling in range(size.bit_length()):
        for splits in (2 << doubling, 3 << doubling):
            chunk = math.ceil(size / splits)
            if chunk >= smallest:
                chunks.append(chunk)
    return chunks


def _stash_plans(problem: Problem) -> list[Plan]:
    base = Plan("stash", problem, 1, 1, problem.classes)
    return [
        replace(base, token_chunk=token_chunk, logit_chunk=logit_chunk)
        for token_chunk in _even_chunks(problem.tokens, _SMALLEST_TILE)
        for logit_chunk in _even_chunks(token_chunk, _SMALLEST_TILE)
    ]


def _recompute_plans(problem: Problem) -> list[Plan]:
    base = Plan("recompute", problem, problem.tokens, problem.tokens, 1)
    return [
        replace(base, vocab_chunk=size) for size in _even_chunks(problem.classes, _SMALLEST_TILE)
    ]


def plan_linear_divergence(
    tokens: int,
    classes: int,
    student_dim: int,
    teacher_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    train_weight: bool = True,
    reduction: str = "sum",
    two_pass: bool = False,
    plan: str = "auto",
    memory_budget: int | None = None,
) -> Plan:
    """The plan that `linear_divergence` would take for these sizes; print it to read it.

    Args:
        tokens, classes, student_dim, teacher_dim: T, the shared V, Ds, Dt.
        dtype: of hidden states and heads; `device`: "cuda" or "cpu".
        train_weight: False for a frozen head, as with LoRA.
        two_pass: True for divergences other than mixes of the two KLs, such as JSD.

    Example:
        >>> print(plan_linear_divergence(8192, 151_936, 1536, 3584))
    """
    problem = Problem(
        tokens=tokens,
        classes=classes,
        student_dim=student_dim,
        teacher_dim=teacher_dim,
        hidden_dtype=dtype,
        weight_dtype=dtype,
        device=device,
        train_weight=train_weight,
        two_pass=two_pass,
        per_token_gradient=reduction == "none",
    )
    return make_plan(problem, plan, memory_budget)
