"""PyTorch's settings that trade the digits of a matrix product for speed, off for ours.

A product of this package accumulates in fp32 and rounds once, whichever plan or kernel computes it:
the fused kernels multiply fp32 in full, so the vendor's products must not take TF32, and a sum over
151,936 classes must not be reduced in bf16. The settings belong to the process. They are changed
only where they are on, and only around a call; meanwhile another thread's products keep more
digits too, and a change that it makes to them is undone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch

_Restore = Callable[[], None]


def _nothing() -> None: ...


def _tf32_off() -> _Restore:
    settings = torch.backends.cuda.matmul
    # torch>=2.9 has a second interface to the same setting, and refuses to mix the two.
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one was used
        precision = settings.fp32_precision
        settings.fp32_precision = "ieee"
        return lambda: setattr(settings, "fp32_precision", precision)
    if older == "highest":
        return _nothing
    newer = getattr(settings, "fp32_precision", None)

    def restore() -> None:
        torch.set_float32_matmul_precision(older)
        if newer is not None and settings.fp32_precision != newer:
            settings.fp32_precision = newer

    torch.set_float32_matmul_precision("highest")
    return restore


def _off(name: str) -> Callable[[], _Restore]:
    def turn_off() -> _Restore:
        settings = torch.backends.cuda.matmul
        if not getattr(settings, name):
            return _nothing
        setattr(settings, name, False)
        return lambda: setattr(settings, name, True)

    return turn_off


class _Switch:
    """A setting that is off while any thread is between `enter` and `leave`."""

    def __init__(self, turn_off: Callable[[], _Restore]) -> None:
        self._turn_off, self._restore = turn_off, _nothing
        self._lock, self._inside = threading.Lock(), 0

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore = self._turn_off()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()


_TF32 = _Switch(_tf32_off)
_BF16_SUMS = _Switch(_off("allow_bf16_reduced_precision_reduction"))
_FP16_SUMS = _Switch(_off("allow_fp16_reduced_precision_reduction"))
_FP16_PRODUCTS = _Switch(_off("allow_fp16_accumulation"))


class _AllOff:
    """Around a product: the settings are off. A class enters in a third of a generator's time."""

    def __init__(self, *switches: _Switch) -> None:
        self._switches = switches

    def __enter__(self) -> None:
        for switch in self._switches:
            switch.enter()

    def __exit__(self, *_: object) -> None:
        for switch in self._switches:
            switch.leave()


# (operands, result). Partial sums have the dtype of the result: in fp32 there is nothing to lose.
_ALL_OFF = {
    (torch.float32, torch.float32): _AllOff(_TF32),
    (torch.bfloat16, torch.bfloat16): _AllOff(_BF16_SUMS),
    (torch.float16, torch.float16): _AllOff(_FP16_SUMS, _FP16_PRODUCTS),
    (torch.float16, torch.float32): _AllOff(_FP16_PRODUCTS),
}
_NONE_OFF = _AllOff()


def full_precision(
    operands: torch.dtype, result: torch.dtype
) -> contextlib.AbstractContextManager[None]:
    """Around a product on a GPU: fp32 multiplies in full, and all sums are fp32."""
    return _ALL_OFF.get((operands, result), _NONE_OFF)
