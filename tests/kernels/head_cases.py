"""Student heads that make a log-probability hard, for the ops on one model's head.

The criterion is that of `cases`: at most 1.5 times the error of plain PyTorch with fp32 logits,
both against the reference in fp64, and no absolute tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.kernels import cases
from tests.kernels.cases import DEVICE

TOKENS, CLASSES, DIM = 23, 1003, 24

Options = dict[str, Any]
Head = tuple[Tensor, Tensor, Options]


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head(dtype: torch.dtype, std: float, tokens: int = TOKENS, classes: int = CLASSES) -> Head:
    """Logits of standard deviation `std`."""
    hidden = _normal(tokens, DIM, seed=0)
    weight = _normal(classes, DIM, seed=1) * (std / DIM**0.5)
    return hidden.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE), {}


def random_head(dtype: torch.dtype) -> Head:
    return head(dtype, 1.0)


def peaked(dtype: torch.dtype) -> Head:
    return head(dtype, 30.0)


def minus_infinity(dtype: torch.dtype) -> Head:
    """Some classes removed by a bias of -inf, the last one too."""
    hidden, weight, _ = head(dtype, 2.0)
    bias = torch.zeros(CLASSES, dtype=dtype, device=DEVICE)
    bias[5:40] = -torch.inf
    bias[-1] = -torch.inf
    return hidden, weight, {"bias": bias}


def odd_options(dtype: torch.dtype) -> Head:
    """Every transform of the logits at once, and classes that do not exist."""
    hidden, weight, _ = head(dtype, 4.0)
    options = {
        "bias": _normal(CLASSES, seed=2).to(dtype).to(DEVICE),
        "temperature": 0.7,
        "softcap": 5.0,
        "logit_scale": -1.7,
        "num_classes": 998,
    }
    return hidden, weight, options


def one_token(dtype: torch.dtype) -> Head:
    return head(dtype, 2.0, tokens=1)


HEADS: dict[str, Callable[[torch.dtype], Head]] = {
    make.__name__: make for make in (random_head, peaked, minus_infinity, odd_options, one_token)
}


def run(
    op: Callable[..., Any],
    case: Head,
    arguments: tuple[Tensor, ...],
    backward: Callable[[dict[str, Tensor]], Tensor],
    dtype: torch.dtype | None = None,
    rounds_dz: bool = False,
    **how: Any,
) -> dict[str, Tensor]:
    """Outputs of `op(hidden, weight, *arguments)` and gradients of `backward(outputs)` by name.

    `dtype`: of the leaves, None for their own. `rounds_dz`: the gradient of the logits is rounded
    to the operands' dtype, as a GPU needs it for its 16-bit products (references only).
    """
    hidden, weight, options = case
    leaves = {"hidden": hidden, "weight": weight}
    if "bias" in options:
        leaves["bias"] = options["bias"]
    leaves = {
        name: leaf.detach().clone().to(dtype or leaf.dtype).requires_grad_()
        for name, leaf in leaves.items()
    }
    operands = leaves["hidden"], leaves["weight"]
    options = {**options, **how}
    if "bias" in leaves:
        options["bias"] = leaves["bias"]
    if rounds_dz and hidden.dtype.itemsize < 4:
        *operands, options["bias"] = cases.behind_rounding(*operands, options.get("bias"))
    output = op(*operands, *arguments, **options)
    output = output if isinstance(output, dict) else output._asdict()
    backward(output).backward()
    gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    return {**{name: value.detach() for name, value in output.items()}, **gradients}
