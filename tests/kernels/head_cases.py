"""Student heads that make a log-probability hard, for the ops on one model's head.

The criterion is that of `cases`: at most 1.5 times the error of plain PyTorch with fp32 logits,
both against the reference in fp64, and no absolute tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esr_kernels.scoring import reference
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


def tokens(case: Head, likely: bool = False) -> tuple[Tensor]:
    """For `token_logprob`: random tokens or the most probable ones, one row left out."""
    hidden, weight, options = case
    classes = options.get("num_classes", weight.shape[0])
    if likely:
        logits = hidden.float() @ weight.float().T
        if "bias" in options:
            # A class that the bias removes would have a log-probability of -inf.
            logits = logits + options["bias"].float()
        ids = logits[:, :classes].argmax(1)
    else:
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(40, classes - 1, (hidden.shape[0],), generator=generator).to(DEVICE)
    if hidden.shape[0] > 4:
        ids[4] = -100
    return (ids,)


def of_tokens(output: dict[str, Tensor]) -> Tensor:
    """Both outputs of `token_logprob` at once, with upstream gradients of either sign."""
    upstream = _normal(3, len(output["logprob"]), seed=6).to(DEVICE)
    fields = output["logprob"], output["entropy"]
    return sum((field * u).sum() for field, u in zip(fields, upstream, strict=False))


def teacher(case: Head, k: int = 11, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """For `linear_topk_divergence`: ids and log-probabilities of a random teacher, or of the
    student's own logits plus noise; one row has fewer than K and one has none."""
    hidden, weight, options = case
    classes = options.get("num_classes", weight.shape[0])
    logits = 3 * _normal(hidden.shape[0], classes, seed=8).to(DEVICE)
    if noise is not None:
        logits = hidden.float() @ weight.float().T + noise / 3 * logits
    if "bias" in options:
        # The classes that a bias of -inf takes from the student are not the teacher's either.
        logits = torch.where(options["bias"][:classes] == -torch.inf, -torch.inf, logits)
    top = logits.log_softmax(-1).topk(k)
    ids = top.indices.clone()
    if hidden.shape[0] > 6:
        ids[3, 5:] = -1
        ids[6] = -1
    return ids, top.values


def of_rows(output: dict[str, Tensor]) -> Tensor:
    upstream = _normal(output["per_token"].shape[0], seed=6).to(DEVICE)
    return (output["loss"] * upstream).sum() if output["loss"].dim() else output["loss"] * 0.25


def three(
    op: Callable[..., Any],
    case: Head,
    arguments: tuple[Tensor, ...],
    *,
    impl: str,
    memory_budget: int | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], ...]:
    """(ours, plain PyTorch, oracle) of an op of `esr_kernels.scoring`, with gradients."""
    spec = getattr(reference, op.__name__)
    backward = of_tokens if op.__name__ == "token_logprob" else of_rows
    call = case, arguments, backward
    return (
        run(op, *call, impl=impl, memory_budget=memory_budget, **options),
        run(partial(spec, dtype=torch.float32), *call, rounds_dz=cases.rounds_dz(impl), **options),
        run(spec, *call, torch.float64, **options),
    )
