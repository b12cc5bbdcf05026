"""Launches of Triton kernels: on which device, with which options, and how many programs."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# At least four waves on a large GPU, whose last is then a small share: an MI300X has room for 2,128
# programs of 4 warps and 70 registers at once, an H100 for 1,320.
_WANTED_PROGRAMS = 9216
# Triton's search for the compiled kernel takes the host longer than the launch. On CUDA, with
# versions whose rules for a variant are known, a launch takes the kernel of an earlier one that has
# the same `_variant`. (ROCm's rules have the size of a tensor's storage besides.)
_REMEMBERS = torch.version.cuda is not None
_KNOWN_TRITON = ("3.4.", "3.5.", "3.6.", "3.7.")
_MOST = 4096
_kernels: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor) -> Callable[..., None]:
    """`kernel[grid]` on the device of `like`.

    Triton launches on the current device, where tensors of another are out of reach. Products and
    sums are fused, which is Triton's default now and not in 3.10: the bits of a result must not
    change with it.
    """

    def launched(*args: Any, **kwargs: Any) -> None:
        if like.is_cuda and not _has_one_gpu():  # Setting a device takes longer than to ask.
            with torch.cuda.device_of(like):
                _launch(kernel, grid, like, args, kwargs)
        else:
            _launch(kernel, grid, like, args, kwargs)

    return launched


@functools.cache
def _has_one_gpu() -> bool:
    return torch.cuda.device_count() == 1


def _launch(
    kernel: Any, grid: tuple[int, ...], like: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not _REMEMBERS:
        kernel[grid](*args, enable_fp_fusion=True, **kwargs)
        return
    given = *args, *kwargs.values()
    # Hashing a kernel hashes its source; kernels live as long as the process.
    variant = id(kernel), like.get_device(), *kwargs, *_variant(given)
    found = _kernels.get(variant)
    if found is None:
        compiled = kernel[grid](*args, enable_fp_fusion=True, **kwargs)
        names = *kernel.arg_names[: len(args)], *kwargs
        _remember(variant, compiled, [names.index(name) for name in kernel.arg_names])
        return
    compiled, in_order = found
    compiled[(*grid, 1, 1)[:3]](*in_order(given))


def _variant(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """What Triton compiles a variant of a kernel for, or more: integers by their value."""
    found: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        # The commonest first; asking a number whether it is a tensor takes as long as the rest.
        if argument is None or kind is int:
            found.append(argument)
        elif kind is Tensor:
            found += argument.dtype, argument.data_ptr() % 16 == 0
        elif kind is float:
            found.append(float)
        elif kind is tuple:
            found.append(_variant(argument))
        elif isinstance(argument, Tensor):
            found += argument.dtype, argument.data_ptr() % 16 == 0
        elif hasattr(argument, "block_shape"):  # a tensor descriptor
            found += argument.base.dtype, tuple(argument.block_shape)
        else:
            found.append((kind, argument))
    return tuple(found)


def _remember(variant: tuple[Any, ...], compiled: Any, order: list[int]) -> None:
    """Keep what a launch has compiled or found, and where the kernel's arguments were given."""
    version = getattr(sys.modules.get("triton"), "__version__", "")
    if not version.startswith(_KNOWN_TRITON) or not hasattr(compiled, "__getitem__"):
        return
    if len(_kernels) >= _MOST:
        _kernels.clear()
    _kernels[variant] = compiled, operator.itemgetter(*order)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` takes two microseconds."""
    return -(-a // b)


@functools.cache
def processors(device: torch.device) -> int:
    """SMs or CUs of a GPU; an H100's where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_columns(rows: int, columns: int, block: int) -> tuple[int, int]:
    """(programs for each row, columns of each program), where a program takes whole blocks.

    With many rows there is one program a row. With few, each row is split until the launch has
    `_WANTED_PROGRAMS` programs, or a program for every block.
    """
    blocks = ceil_div(columns, block)
    splits = min(blocks, ceil_div(_WANTED_PROGRAMS, max(rows, 1)))
    width = ceil_div(blocks, splits) * block
    return ceil_div(columns, width), width
