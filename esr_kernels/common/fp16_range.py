"""Keeping gradients with respect to logits inside the range of fp16.

fp16 has no numbers below 6e-8, and the probabilities of a large vocabulary times the weight of one
token among many lie below that. So dz is computed from factors scaled to about 32, by a power of
two, and the gradients, which are summed in fp32, are scaled back before they are rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_FACTOR = 32.0
_LEAST = 2.0**-100  # all factors 0 must not give a scale of infinity


def fp16_scale(*factors: Tensor | None) -> Tensor:
    """The power of two, a 0-d tensor, that brings the largest factor of dz to about 32.

    Factors that are NaN or infinite are left out: they spoil their own rows only.
    """
    sizes = torch.cat([factor.abs().flatten() for factor in factors if factor is not None])
    sizes = torch.nan_to_num(sizes, nan=0.0, posinf=0.0)
    largest = torch.cat([sizes, sizes.new_full((1,), _LEAST)]).amax()
    return _LARGEST_FACTOR / torch.exp2(torch.floor(torch.log2(largest)))
