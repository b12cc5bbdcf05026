"""Launches of Triton kernels: on which device, with which options, and how many programs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
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
        with torch.cuda.device_of(like):
            if not _REMEMBERS:
                kernel[grid](*args, enable_fp_fusion=True, **kwargs)
                return
            variant = kernel, like.device, tuple(kwargs), *map(_variant, (*args, *kwargs.values()))
            found = _kernels.get(variant)
            if found is None:
                compiled = kernel[grid](*args, enable_fp_fusion=True, **kwargs)
                _remember(variant, compiled)
                return
            compiled, names = found
            compiled[(*grid, 1, 1)[:3]](*args, *[kwargs[name] for name in names])

    return launched


def _variant(argument: Any) -> Any:
    """What Triton compiles a variant of a kernel for, or more: integers by their value."""
    kind = type(argument)
    if kind is tuple:
        return tuple(map(_variant, argument))
    if kind is float:
        return kind
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return kind, argument


def _remember(variant: tuple[Any, ...], compiled: Any) -> None:
    """Keep what a launch has compiled or found, with the names of the arguments by keyword."""
    version = getattr(sys.modules.get("triton"), "__version__", "")
    if not version.startswith(_KNOWN_TRITON) or not hasattr(compiled, "__getitem__"):
        return
    if len(_kernels) >= _MOST:
        _kernels.clear()
    kernel, _, by_keyword, *arguments = variant
    positional = len(arguments) - len(by_keyword)
    _kernels[variant] = compiled, tuple(kernel.arg_names[positional:])


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
    blocks = -(-columns // block)
    splits = min(blocks, -(-_WANTED_PROGRAMS // max(rows, 1)))
    width = -(-blocks // splits) * block
    return -(-columns // width), width
