"""A call of an op on tensors without data: every launch it makes on a GPU, in order.

Tensors lie on the meta device, which the package takes for a GPU. PyTorch works out shapes and
dtypes and computes nothing; Triton's launches are compiled for the wanted architecture, or, where
Triton interprets kernels, noted by their name alone. Views,
uninitialised memory and operations on nothing launch nothing; every other operation of PyTorch
counts as one launch (a matrix product may take a second one to add up its splits).
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from bench.ahead_of_time import TARGETS, Launched, launches_compile
from esr_kernels.common import matmul
from esr_kernels.divergence import fused_triton

_NO_LAUNCH = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "set_", "lift_fresh")
# What the first operand held is not read.
_WRITES_ONLY = ("copy_", "zero", "ones", "fill", "full")


@dataclass(frozen=True)
class Product:
    """out [m, n] (+)= a [m, k] @ b [k, n]."""

    m: int
    n: int
    k: int
    operand: torch.dtype
    out: torch.dtype
    accumulates: bool

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Elementwise:
    """Any other operation of PyTorch; `moved` bytes if all operands pass memory once."""

    name: str
    moved: int


Launch = Product | Elementwise | Launched


class _Recorder(TorchDispatchMode):
    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = function._overloadpacket.__name__
        if name in ("mm", "addmm"):
            return self._product(function, name, args, kwargs)
        result = function(*args, **kwargs)
        results = result if isinstance(result, tuple | list) else (result,)
        tensors = [x for x in results if isinstance(x, Tensor)]
        on_gpu = any(x.device.type == "meta" and x.numel() for x in tensors)
        if on_gpu and not function.is_view and not name.startswith(_NO_LAUNCH):
            read = [] if name.startswith(_WRITES_ONLY) else _tensors(args)
            moved = sum(x.numel() * x.element_size() for x in (*read, *tensors))
            if name == "copy_":
                moved += args[1].numel() * args[1].element_size()
            self.launches.append(Elementwise(name, moved))
        return result

    def _product(self, function, name: str, args, kwargs):  # type: ignore[no-untyped-def]
        a, b = args[-2:] if name == "mm" and len(args) == 2 else args[name == "addmm" :][:2]
        out = kwargs.get("out")
        if out is None:  # some overloads have no rule for tensors without data
            dtype = next((x for x in args if isinstance(x, torch.dtype)), a.dtype)
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
        accumulates = name == "addmm" and kwargs.get("beta", 1) != 0
        if out.numel():
            (m, k), n = a.shape, b.shape[1]
            self.launches.append(Product(m, n, k, a.dtype, out.dtype, accumulates))
        return out


def _tensors(values) -> list[Tensor]:  # type: ignore[no-untyped-def]
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


def walk(arch: str, call: Callable[[], object], processors: int = 132) -> list[Launch]:
    """Every launch of `call`, which makes its own tensors on the meta device."""
    launches: list[Any] = []

    def note(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: launches.append(Launched(kernel, None, math.prod(grid), 0))

    with (
        launches_compile(TARGETS[arch], launches),
        mock.patch.object(InterpretedFunction, "__getitem__", note),
        mock.patch.object(
            torch.Tensor, "is_meta", property(lambda tensor: False)
        ),  # which the boundary refuses
        mock.patch.object(torch, "is_autocast_enabled", lambda kind: False),
        mock.patch.object(fused_triton, "processors", lambda device: processors),
        mock.patch.object(matmul, "_widens", lambda operand: operand.element_size() == 2),
        mock.patch.object(matmul, "plain_precision", lambda like: nullcontext()),
        _Recorder(launches),
    ):
        call()
    return launches


def counts(launches: list[Launch]) -> collections.Counter[str]:
    """How many launches there are of each kind."""
    return collections.Counter(map(_kind, launches))


def _kind(launch: Launch) -> str:
    if isinstance(launch, Product):
        return "product"
    if isinstance(launch, Elementwise):
        return launch.name
    return launch.function.fn.__name__.lstrip("_")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)
