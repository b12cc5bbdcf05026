"""Random numbers, tensors and options for `fuzz_cases`: what all public ops have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGEST = 3000
# Elements of the logits of the largest case: a second or two of plain PyTorch in fp64.
MOST_LOGITS = 1_000_000
# A Triton kernel takes up to a second for this much in the interpreter.
TRITON_ROWS, TRITON_CLASSES = 40, 300
NARROW = (torch.float32, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """One call: what it takes, and which of it gets a gradient."""

    op: Callable[..., Any]
    arguments: dict[str, Any]  # all of them, by name
    trained: list[str] = field(default_factory=list)  # arguments that require a gradient
    upstream: dict[str, Tensor] = field(default_factory=dict)  # gradients of outputs, by name
    head: tuple[str, str, str] = ("hidden", "weight", "bias")  # names of the trained operands
    rows: list[str] = field(default_factory=list)  # matrices with a row for each token

    @property
    def impl(self) -> str:
        return self.arguments["impl"]

    def __str__(self) -> str:
        shown = (f"{name}={_short(value)}" for name, value in self.arguments.items())
        return f"{self.op.__name__}({', '.join(shown)}; trained {self.trained})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        plain = "" if value.is_contiguous() else f" strides {list(value.stride())}"
        return f"{dtype}{list(value.shape)}{plain}"
    if hasattr(value, "token_chunk"):
        chunks = value.token_chunk, value.logit_chunk, value.vocab_chunk
        return f"Plan({value.kind}, {chunks})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"({', '.join(map(_short, value))})"
    return repr(value)[:200]


class Dice:
    """All randomness of a case."""

    def __init__(self, seed: int) -> None:
        self.rolls = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.rolls.random() < probability

    def one(self, options: Sequence[Any]) -> Any:
        return self.rolls.choice(options)

    def between(self, low: float, high: float) -> float:
        return self.rolls.uniform(low, high)

    def maybe(self, probability: float, make: Callable[[], Any]) -> Any:
        return make() if self.chance(probability) else None

    def size(self, least: int, most: int) -> int:
        """Small ones as often as large ones, and the neighbours of powers of two more often."""
        if most <= least:
            return least
        if self.chance(0.05):
            return least
        size = int((most + 1 - least) ** self.rolls.random()) - 1 + least
        if self.chance(0.3):
            size = (1 << max(size, 1).bit_length()) + self.one([-1, 0, 1])
        return min(max(size, least), most)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.noise)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """From `low` to `high` - 1."""
        return torch.randint(low, high, shape, generator=self.noise)

    def some(self, count: int, of: int) -> Tensor:
        return torch.randperm(of, generator=self.noise)[:count]

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values with other strides, or elsewhere in a larger buffer."""
        kind = self.one(["as it is", "as it is", "offset", "gaps", "turned"])
        if kind == "turned" and x.dim() > 1:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "gaps":
            step = self.one([2, 3])
            view = x.new_zeros(*x.shape[:-1], step * x.shape[-1] + 1)[..., 1::step]
        elif kind == "offset":
            wide = x.new_zeros(x.shape[0] + 1, *x.shape[1:-1], x.shape[-1] + 3)
            view = wide[1:, ..., 2:-1] if x.dim() > 1 else x.new_zeros(x.shape[0] + 3)[2:-1]
        else:
            return x.contiguous()
        view.copy_(x)
        return view


def any_impl(dice: Dice) -> str:
    return dice.one(["auto"] * 4 + ["torch"] * 2 + ["triton"])


def any_sizes(dice: Dice, impl: str) -> tuple[int, int]:
    """(rows, classes)."""
    if impl == "triton":
        return dice.size(0, TRITON_ROWS), dice.size(1, TRITON_CLASSES)
    classes = dice.size(1, LARGEST)
    return dice.size(0, min(LARGEST, MOST_LOGITS // classes)), classes


def any_dim(dice: Dice, impl: str) -> int:
    return dice.size(1, 40 if impl == "triton" else 300)


def any_dtype(dice: Dice, impl: str) -> torch.dtype:
    return torch.float64 if impl != "triton" and dice.chance(0.08) else dice.one(NARROW)


def any_operands(
    dice: Dice, rows: int, classes: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    std = dice.one([0.1, 1.0, 3.0, 10.0, 30.0])
    hidden, weight = dice.normal(rows, dim), dice.normal(classes, dim) * (std / dim**0.5)
    return dice.laid_out(hidden.to(dtype)), dice.laid_out(weight.to(dtype))


def any_bias(
    dice: Dice, rows: int, dtype: torch.dtype, removed: Tensor | None, scale: float
) -> Tensor:
    """Of any dtype; removes the classes `removed` [rows]: their scaled logit is -inf."""
    lowest = -torch.inf if scale > 0 else torch.inf
    bias = dice.normal(rows).to(dtype if dtype == torch.float64 else dice.one([dtype, *NARROW]))
    return dice.laid_out(bias if removed is None else bias.masked_fill(removed, lowest))


def any_removed(dice: Dice, rows: int, spared: Tensor) -> Tensor:
    """Some of the rows of a head, never those of `spared`."""
    removed = torch.rand(rows, generator=dice.noise) < dice.one([0.02, 0.3, 0.9])
    removed[spared] = False
    return removed


def _scale(dice: Dice) -> float:
    return dice.one([-1, 1, 1]) * dice.between(0.2, 2.0)


def any_transform(dice: Dice) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if dice.chance(0.3):
        found["softcap"] = dice.between(2.0, 50.0)
    if dice.chance(0.3):
        found["logit_scale"] = _scale(dice)
    return found


def any_token_weights(dice: Dice, rows: int, reduction: str) -> Tensor:
    kind = dice.one(["positive", "either sign", "integers", "all zero", "one value", "16 bits"])
    weights = torch.rand(rows, generator=dice.noise) + 0.1
    if kind == "either sign" and reduction != "mean":
        weights = weights * dice.one([-1, 1]) * torch.sign(dice.normal(rows))
    if kind == "integers":
        weights = dice.integers(0, 3, (rows,))
    if kind == "16 bits":
        weights = weights.to(torch.bfloat16)
    if kind == "one value":
        return torch.tensor([dice.one([-0.5, 1.5])]).expand(rows)
    if kind == "all zero":
        weights = weights * 0
    weights[torch.rand(rows, generator=dice.noise) < dice.one([0.0, 0.3, 0.9])] = 0
    return dice.laid_out(weights)
