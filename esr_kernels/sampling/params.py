"""Arguments and result of a draw: the caller's parameters, and their values for each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esr_kernels.common.transform import LogitTransform

# Classes that share a Gumbel variate. With another width, the same keys draw other tokens.
TILE = 256
# Below this a division by the temperature leaves the range of fp32 for ordinary logits.
_COLDEST = 1e-6


class Floor(NamedTuple):
    """A filter that keeps the classes whose logit is at least a floor of their row."""

    off: float  # the value that filters nothing
    allowed: Callable[[Any], Any]  # of a value
    meaning: str  # what is allowed, in words
    # (values [B], largest logit [B], log-sum-exp [B]) -> the floor [B]; logits at the temperature
    lowest: Callable[[Tensor, Tensor, Tensor], Tensor]


# A filter of this kind is an entry here and a field of `SamplingParams`: every implementation takes
# its floor from here. Top-k and top-p rank classes, and have kernels of their own.
FLOORS = {
    "min_p": Floor(
        0.0,
        lambda p: (p >= 0) & (p <= 1),
        "from 0 to 1",
        lambda p, top, lse: top + p.log(),
    ),
}


@dataclass(frozen=True)
class SamplingParams:
    """Temperature and filters of a row's distribution, applied in this order.

    Order the classes of a row by logit, largest first, equal ones by id, lowest first. Each filter
    keeps the first classes of that order, so together they keep those of the strictest:

        temperature   z / temperature; 0 is greedy: the first class of the order, no filter
        top_k         the first k classes; 0 or k >= V keeps all
        top_p         of those, the fewest whose share of *their* mass reaches top_p; 1 keeps all
        min_p         of those, the classes whose probability is at least min_p times the largest

    That is the order of transformers. At the k-th value and at the edge of the nucleus, exactly as
    many ties are kept as fit, lowest ids first; min_p keeps all ties.

    Each is a number for all rows, or a tensor [B] on the device of the rows (top_k int64, the
    others floating point). Numbers, and tensors on CPU, are checked.
    """

    temperature: float | Tensor = 1.0
    top_k: int | Tensor = 0
    top_p: float | Tensor = 1.0
    min_p: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _check_range(
            "temperature",
            self.temperature,
            lambda t: (t == 0) | ((t >= _COLDEST) & (t < math.inf)),
            f"0 (greedy) or finite and at least {_COLDEST:g}",
        )
        _check_range("top_k", self.top_k, lambda k: k >= 0, "0 (off) or positive")
        _check_range("top_p", self.top_p, lambda p: (p > 0) & (p <= 1), "above 0 and at most 1")
        for name, floor in FLOORS.items():
            _check_range(name, getattr(self, name), floor.allowed, floor.meaning)


def _check_range(
    name: str, value: float | Tensor, allowed: Callable[[Any], Any], meaning: str
) -> None:
    integral = name == "top_k"
    if not isinstance(value, Tensor):
        kinds = (int,) if integral else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(
                f"{name} must be {'an integer' if integral else 'a number'} or a tensor, "
                f"got {type(value).__name__}"
            )
        if not allowed(value):
            raise ValueError(f"{name} must be {meaning}, got {value}")
        return
    if integral and value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {value.dtype}")
    if not integral and not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    # On a GPU, reading the values would wait for it.
    if value.device.type == "cpu" and not bool(allowed(value).all()):
        bad = int((~allowed(value)).flatten().to(torch.int8).argmax())
        raise ValueError(f"{name} must be {meaning}, got {value.flatten()[bad]} at row {bad}")


class Sample(NamedTuple):
    """The result of a draw, each [B]."""

    tokens: Tensor  # int64
    logprob: Tensor  # fp32, log softmax(z / temperature)[token] over all valid classes, nats
    log_kept: Tensor  # fp32, log of the mass that the filters kept; 0 where they are off
    lse: Tensor  # fp32, log-sum-exp of z / temperature over all valid classes


@dataclass(frozen=True)
class RowParams:
    """`SamplingParams` with one value a row: each [B], or None where off for every row."""

    inv_temperature: Tensor | None  # fp32; 1 in greedy rows
    greedy: Tensor | None  # bool
    all_greedy: bool
    top_k: Tensor | None  # int64; 0 is off
    top_p: Tensor | None  # fp32; 1 is off
    floors: dict[str, Tensor]  # fp32 values of those in `FLOORS` that are on in some row

    @property
    def filtered(self) -> bool:
        return self.ranked or bool(self.floors)

    @property
    def ranked(self) -> bool:
        """Whether classes are ranked, for top-k or top-p."""
        return self.top_k is not None or self.top_p is not None

    def lowest(self, top: Tensor, lse: Tensor) -> Tensor | None:
        """The highest floor of each row [B]; None without such a filter."""
        found = [
            FLOORS[name].lowest(value.to(top.dtype), top, lse)
            for name, value in self.floors.items()
        ]
        # The largest logit stays, whatever a floor says: a row must keep a class.
        return torch.minimum(reduce(torch.maximum, found), top) if found else None

    def of_rows(self, rows: slice) -> RowParams:
        """The parameters of some of the rows."""
        tensors: dict[str, Any] = {
            name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        floors = {name: value[rows] for name, value in self.floors.items()}
        return replace(self, **tensors, floors=floors)


@dataclass(frozen=True)
class Classes:
    """The classes that can be drawn, and the transform of their logits."""

    count: int  # classes 0 to count - 1 exist
    bias: Tensor | None  # [count]
    transform: LogitTransform  # temperature 1: that of each row is applied after it
    invalid: Tensor | None  # [count] bool, or int64 ids; Triton takes the former


def row_params(params: SamplingParams, rows: int, classes: int, device: torch.device) -> RowParams:
    """The parameters of each of `rows` rows over `classes` classes."""

    def each(value: float | Tensor, off: float, dtype: torch.dtype) -> Tensor | None:
        if isinstance(value, Tensor):
            return value.to(dtype).contiguous()  # kernels read them without a stride
        if value == off:
            return None
        return torch.full((rows,), value, dtype=dtype, device=device)

    temperature = params.temperature
    if isinstance(temperature, Tensor):
        cold = temperature == 0
        greedy: Tensor | None = cold
        inverse: Tensor | None = torch.where(cold, 1.0, temperature).double().reciprocal().float()
        all_greedy = False
    else:
        greedy, all_greedy = None, temperature == 0
        inverse = each(1.0 / (temperature or 1.0), 1.0, torch.float32)
    if all_greedy:
        return RowParams(None, None, True, None, None, {})
    top_k = params.top_k
    if isinstance(top_k, int) and top_k >= classes:
        top_k = 0
    floors = {name: each(getattr(params, name), f.off, torch.float32) for name, f in FLOORS.items()}
    return RowParams(
        inverse,
        greedy,
        False,
        each(top_k, 0, torch.int64),
        each(params.top_p, 1.0, torch.float32),
        {name: value for name, value in floors.items() if value is not None},
    )
