"""From a head's raw logits to the logits of its distribution: bias, scale, softcap, temperature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """softcap * tanh(scale * (h W^T + b) / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """d(transformed)/d(raw), except for the factor 1 - tanh^2 of a softcap."""
        return self.scale / self.temperature

    def kernel_argument(
        self, bias: Tensor | None
    ) -> tuple[Tensor | None, float | None, float | None, float | None]:
        """The `transform` tuple of `logits_triton.transform_logits`."""
        return bias, *self._numbers

    @cached_property
    def _numbers(self) -> tuple[float | None, float | None, float | None]:
        scale = None if self.scale == 1 else float(self.scale)
        softcap = None if self.softcap is None else float(self.softcap)
        inv_temperature = None if self.temperature == 1 else 1.0 / self.temperature
        return scale, softcap, inv_temperature


def cap_(z: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """In place: raw logits -> tanh of the softcap, or transformed logits where there is none."""
    if bias is not None:
        z.add_(bias)
    if transform.softcap is not None:
        z.mul_(transform.scale / transform.softcap).tanh_()
    elif transform.slope != 1.0:
        z.mul_(transform.slope)


def uncap_(z: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """In place: the output of `cap_` -> transformed logits.

    A class that a bias of -inf removed stays removed: its tanh of -1 is a finite logit.
    """
    if transform.softcap is not None:
        z.mul_(transform.softcap / transform.temperature)
        if bias is not None:
            z.masked_fill_(bias * transform.scale == -torch.inf, -torch.inf)


def transform_(z: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
    """In place: raw logits [n, V] plus bias [V] -> transformed logits."""
    cap_(z, bias, transform)
    uncap_(z, bias, transform)
