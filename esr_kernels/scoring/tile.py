"""Arguments and results of the passes over a tile of logits, for PyTorch and Triton."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Columns of a part's statistics of its unselected classes, each relative to their maximum:
# the log of the sum of exponentials, and the mean logit under their softmax.
MAX, LOG_SUM, CENTRED = 0, 1, 2
COLUMNS = 3


class Tile(NamedTuple):
    """Raw logits of consecutive classes. The passes overwrite them."""

    z: Tensor  # [T, w], fp32 or fp64
    bias: Tensor | None  # [w]
    first: int  # the class of column 0


class UnselectedGradient(NamedTuple):
    """Gradient of the unselected classes: pi (constant + linear * log pi). Fields are [T]."""

    top: Tensor  # log pi is logit - top - lse; adding the two first would round
    lse: Tensor
    constant: Tensor
    linear: Tensor | None

    def times(self, factor: Tensor) -> UnselectedGradient:
        """The gradient multiplied by `factor`."""
        linear = None if self.linear is None else self.linear * factor
        return self._replace(constant=self.constant * factor, linear=linear)
