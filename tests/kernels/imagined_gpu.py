"""Tensors on a GPU that is not there: shapes, dtypes, strides and devices without numbers.

The path that an op takes on a GPU runs from end to end under `imagined_gpu()`: PyTorch's operators
on the meta device, which check shapes and dtypes, Triton's launches through `_check_launch`. What a
real GPU would fault on, or wait for, raises `AssertionError` here:

    operands of one operator, or of one launch, on different devices
    a value that the host reads (.item(), bool(), a mask as index, nonzero)
    a copy to the host; a copy from the host out of memory that is not pinned, or that blocks
    a tensor with gaps between its elements given to a kernel without its strides
    a product whose rows do not start at multiples of 16 bytes
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import inspect
import pkgutil
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import esr_kernels
from esr_kernels.common import matmul

# Operations that make the host wait for a GPU, because it reads values.
READS_VALUES = {
    "_local_scalar_dense",
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
    "bincount",
    "repeat_interleave",
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_VECTOR_BYTES = 16


class Imagined(Tensor):
    """A tensor whose storage is on the meta device, and which says that it is on `device`.

    To autograd it is on the CPU: a build without CUDA has no streams to order a backward by.
    """

    shape_only: Tensor
    where: torch.device

    @staticmethod
    def __new__(cls, shape_only: Tensor, where: torch.device) -> Imagined:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            shape_only.shape,
            strides=shape_only.stride(),
            storage_offset=shape_only.storage_offset(),
            dtype=shape_only.dtype,
            device="cpu",
        )
        made.shape_only, made.where = shape_only, where
        memory.hold(made)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.where.type == "cuda"

    def cpu(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        raise AssertionError("a copy to the host waits")

    numpy = tolist = cpu  # type: ignore[assignment]

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        device = kwargs.get("device", args[0] if args else None)
        if isinstance(device, (str, torch.device)):
            assert torch.device(device).type != "cpu", "a copy to the host waits"
            if torch.device(device) == self.where:  # to C++ it would be a copy
                args = args[1:] if args and args[0] is device else args
                kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
                if not args and not kwargs:
                    return self
        return super().to(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Imagined({list(self.shape)}, {self.dtype}, {self.where})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return _run(function, args, kwargs or {})


class _Memory:
    """Bytes that imagined tensors hold, and the most that they held at once."""

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._holders: collections.Counter[int] = collections.Counter()

    def hold(self, tensor: Imagined) -> None:
        storage = tensor.shape_only.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if self._holders[key] == 0:
            self.held += size
            self.peak = max(self.peak, self.held)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            self.held -= size

    def restart(self) -> int:
        """The bytes held now, from which the peak is counted again."""
        self.peak = self.held
        return self.held


memory = _Memory()


class _Mode(TorchDispatchMode):
    """Catches what makes tensors from nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = function._overloadpacket.__name__
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    imagined = [x for x in tensors if isinstance(x, Imagined)]
    asked = kwargs.get("device")
    target = None if asked is None else torch.device(asked)
    if imagined and isinstance(args[0], Imagined) and target == torch.device("cpu"):
        # A derivative of autograd's, which takes the device from C++. From Python, `to` and `cpu`
        # have raised already.
        target = args[0].where
    if not imagined and (target is None or target.type != "cuda"):
        return function(*args, **kwargs)  # on the CPU, where numbers are
    assert name not in READS_VALUES, f"{name} makes the host wait for a value"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        assert not masks, f"{name} with a mask makes the host wait for its count"
    if name == "_to_copy" and not imagined:
        assert kwargs.get("non_blocking"), "a copy to the GPU that blocks"
        assert getattr(tensors[0], "imagined_pinned", False), "a copy from memory not pinned"
    elif name != "copy_":
        places = {x.device for x in tensors if x.dim() or isinstance(x, Imagined)}
        assert len(places) <= 1, f"{name} of tensors on {places}"
    if name in _PRODUCTS:
        _check_alignment(name, tensors)
        a, b = [x for x in args if isinstance(x, Tensor)][-2:]
        products.append((a.shape[-2], b.shape[-1], a.shape[-1]))
    device = _indexed(target) if target is not None else imagined[0].where

    def on_meta(x: Any) -> Any:
        if isinstance(x, Imagined):
            return x.shape_only
        # A number, which PyTorch takes from the CPU, or the source of a copy.
        return x.to("meta") if isinstance(x, Tensor) else x

    meta_args, meta_kwargs = tree_map(on_meta, (args, kwargs))
    if target is not None:
        meta_kwargs["device"] = "meta"
    meta_kwargs.pop("pin_memory", None)
    with torch._C._DisableTorchDispatch():
        result = _on_meta_device(function, meta_args, meta_kwargs)
    result = tree_map(lambda x: Imagined(x, device) if isinstance(x, Tensor) else x, result)
    return return_and_correct_aliasing(function, args, kwargs, result)


def _on_meta_device(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if str(function) != "aten.addmm.dtype_out":
        return function(*args, **kwargs)
    # PyTorch 2.11 has no meta kernel of it.
    added, a, b, dtype = args
    out = kwargs["out"]
    assert a.dtype == b.dtype and added.dtype == out.dtype == dtype
    assert added.shape == out.shape == torch.mm(a, b).shape
    return out


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


def _check_alignment(name: str, tensors: list[Tensor]) -> None:
    """Rows at multiples of 16 bytes in every operand of a product that could have them."""
    for x in tensors:
        if x.dim() != 2 or x.stride(0) == x.stride(1) == 0:
            continue
        row = max(x.stride()) * x.itemsize
        start = x.storage_offset() * x.itemsize
        ok = min(x.shape) <= 1 or (row % _VECTOR_BYTES == 0 and start % _VECTOR_BYTES == 0)
        assert ok, f"{name} of {list(x.shape)} with rows of {row} bytes from byte {start}"


def _check_launch(kernel: Any, grid: tuple[int, ...], like: Tensor) -> Any:
    """In the place of `launch`: checks what the kernel is given, and computes nothing."""
    assert all(isinstance(size, int) and size > 0 for size in grid), f"a grid of {grid}"
    names = list(inspect.signature(getattr(kernel, "fn", kernel)).parameters)

    def launched(*args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        missing = set(names) - set(given)
        assert not missing, f"{kernel} lacks {missing}"
        launches.append(kernel.__name__)
        flat = tree_flatten(list(given.values()))[0]
        numbers = {x for x in flat if isinstance(x, int)}
        for name, value in given.items():
            for x in tree_flatten(value)[0]:
                if isinstance(x, Tensor):
                    _check_operand(f"{name} of {kernel.__name__}", x, like, numbers)

    return launched


launches: list[str] = []  # names of kernels, in order
products: list[tuple[int, int, int]] = []  # rows, columns and depth of matrix products, in order
_REPLACED = {"launch": _check_launch, "current_arch": lambda like: "sm_90"}


def _check_operand(name: str, x: Tensor, like: Tensor, numbers: set[int]) -> None:
    assert x.device == like.device, f"{name} is on {x.device}, the launch on {like.device}"
    assert x.dtype != torch.float64, f"{name} is fp64"
    if x.is_contiguous():
        return
    assert x.dim() > 1, f"{name} is a vector of stride {x.stride(0)}"
    strides = {stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1}
    unknown = strides - numbers - {1}
    assert not unknown, f"{name}, {list(x.shape)}, has strides {x.stride()} that it is not given"


@contextlib.contextmanager
def imagined_gpu(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make tensors with device="cuda" inside; ops run on them as on a GPU of compute 9.0."""
    for found in pkgutil.walk_packages(esr_kernels.__path__, "esr_kernels."):
        if not found.name.endswith("_triton"):
            continue
        module = importlib.import_module(found.name)
        for name, replacement in _REPLACED.items():
            if hasattr(module, name):
                patch.setattr(module, name, replacement)
    patch.setattr(matmul, "KERNELS_ON_CPU", False)
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    patch.setattr(Tensor, "pin_memory", _pinned)
    launches.clear()
    products.clear()
    with _Mode():
        yield


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.imagined_pinned = True  # type: ignore[attr-defined]
    return copy
