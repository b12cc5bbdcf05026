"""A head's distributions with some classes of each row picked out: the primitive below
`token_logprob` and `linear_topk_divergence`.

Of every row of logits z it keeps the K picked ones and, of all others, the log-sum-exp and the
entropy of their own softmax pi. Log-probability of a token, entropy, a tail bucket, the mass on a
teacher's top-k: all are short formulas in those, and autograd differentiates the formulas. What
remains to be written by hand is the gradient of this primitive:

    dz_k = d picked_k                                            for a picked class
    dz_v = pi_v (d lse - d entropy (log pi_v + entropy))         for any other class

The forward projects tiles of classes and throws them away; the backward projects them again, with
the classes outside and the tokens inside: a tile of the weight gradient is written once, the hidden
gradient accumulates in fp32. Without a gradient for the others nothing is projected again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul
from esr_kernels.common.head import Head, values_are_at_hand, vocab_tile
from esr_kernels.common.transform import LogitTransform

# The id of no class: pads rows that pick fewer than K.
NO_CLASS = -1

# Columns of a part's statistics of the classes that were not picked.
MAX, LOG_SUM, CENTRED = 0, 1, 2
COLUMNS = 3


class Picked(NamedTuple):
    """Transformed logits of picked classes and statistics of the others, fp32 (fp64 for fp64).

    `logits` and `rest_lse` are relative to `top`, the largest logit that was not picked (0 where
    there is none): differences of them keep the digits that adding it would round away.
    """

    logits: Tensor  # [T, K]; -inf for NO_CLASS, NaN for an id out of range
    rest_lse: Tensor  # [T]; -inf where no class is left
    rest_entropy: Tensor  # [T], nats; 0 where no class is left
    top: Tensor  # [T], a constant to autograd


class RestGradient(NamedTuple):
    """Gradient of the classes that were not picked: pi (constant + linear * log pi), each [T]."""

    top: Tensor  # log pi is their logit - top - lse: apart, since adding them would round
    lse: Tensor
    constant: Tensor
    linear: Tensor | None


@dataclass(frozen=True)
class _Call:
    op: str
    transform: LogitTransform
    classes: int
    tile: int
    rows: ModuleType
    dz_dtype: torch.dtype

    def tiles(self) -> Iterator[slice]:
        for start in range(0, self.classes, self.tile):
            yield slice(start, min(start + self.tile, self.classes))


def pick(
    head: Head,
    ids: Tensor,
    live: Tensor | None,
    *,
    op: str,
    impl: str,
    memory_budget: int | None,
) -> Picked:
    """Pick the classes `ids` [T, K] (distinct in a row, or NO_CLASS) out of every row.

    Rows where `live` [T] is False give zeros and take no gradient, NaN or not. Where counting them
    needs no synchronisation, on CPU, they are not computed.
    """
    rows = _rows_module(head, impl)
    logits_dtype = matmul.logits_dtype(head.hidden.dtype)
    # On CPU nothing is gained by rounding the gradient of the logits.
    on_cpu = head.hidden.device.type == "cpu" and rows.__name__.endswith("_torch")
    dz_dtype = logits_dtype if on_cpu else head.hidden.dtype
    element_bytes = logits_dtype.itemsize + (dz_dtype != logits_dtype) * dz_dtype.itemsize
    hidden, index = head.hidden, None
    if live is not None and values_are_at_hand(live):  # on a GPU counting would stall
        if not bool(live.all()):
            index = live.nonzero()[:, 0]
            hidden, ids = hidden[index], ids[index]
        live = None
    tile = vocab_tile(head._replace(hidden=hidden), element_bytes, memory_budget)
    call = _Call(op, head.transform, head.classes, tile, rows, dz_dtype)
    fields = _Pick.apply(hidden, head.weight, head.bias, ids.contiguous(), live, call)
    if index is not None:
        tokens = head.hidden.shape[0]
        fields = [
            field.new_zeros(tokens, *field.shape[1:]).index_put((index,), field) for field in fields
        ]
    return Picked(*fields)


def _rows_module(head: Head, impl: str) -> ModuleType:
    """The module with the row passes that `impl` stands for."""
    # Imported here: both import this module, and Triton is not installed everywhere.
    from esr_kernels.scoring import selected_torch as picked_torch

    on_cpu = head.hidden.device.type == "cpu" or head.hidden.dtype == torch.float64
    if impl == "torch" or (impl == "auto" and on_cpu):
        return picked_torch
    from esr_kernels.scoring import selected_triton as picked_triton

    return picked_triton


class _Pick(torch.autograd.Function):
    """Keeps a few floats a token; the backward projects again, any number of times."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, live, call):  # type: ignore[no-untyped-def]
        with matmul.plain_precision(hidden):
            picked, chain = _statistics(hidden, weight, bias, ids, call)
        if live is not None:
            picked = Picked(*(torch.where(_like(live, field), field, 0) for field in picked))
        ctx.save_for_backward(hidden, weight, bias, ids, live, chain, *picked)
        ctx.call = call
        ctx.mark_non_differentiable(picked.top)
        ctx.set_materialize_grads(False)
        return tuple(picked)

    @staticmethod
    def backward(ctx, d_logits, d_lse, d_entropy, _):  # type: ignore[no-untyped-def]
        if d_logits is None and d_lse is None and d_entropy is None:
            return (None,) * 6
        # Autograd turns gradients on in a backward only for create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.call.op} has no double backward (create_graph=True); "
                "use impl='reference' for second derivatives"
            )
        hidden, weight, bias, ids, live, chain, *fields = ctx.saved_tensors
        picked = Picked(*fields)
        with matmul.plain_precision(hidden):
            gradients = _gradients(
                (hidden, weight, bias),
                ids,
                _picked_gradient(picked, d_logits, chain, live, ctx.call.transform.slope),
                _rest_gradient(picked, d_lse, d_entropy, live, ctx.call.transform.slope),
                ctx.call,
                ctx.needs_input_grad[:3],
            )
        return *gradients, None, None, None


def _like(rows: Tensor, field: Tensor) -> Tensor:
    return rows[:, None] if field.dim() == 2 else rows


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, call: _Call
) -> tuple[Picked, Tensor | None]:
    """What is kept of every row and, with a softcap, its derivative [T, K] at picked logits."""
    dtype = matmul.logits_dtype(hidden.dtype)
    # What no tile fills in: padding stays -inf, ids that no tile has stay NaN.
    logits = torch.where(ids == NO_CLASS, -torch.inf, torch.nan).to(dtype)
    chain = None if call.transform.softcap is None else torch.zeros_like(logits)
    buffer = torch.empty(hidden.shape[0] * call.tile, dtype=dtype, device=hidden.device)
    parts = []
    for classes in call.tiles():
        z = matmul.project(hidden, weight[classes], _view(buffer, hidden, classes))
        tile_bias = None if bias is None else bias[classes]
        part = call.rows.tile_statistics(
            z, tile_bias, call.transform, ids, classes.start, logits, chain
        )
        parts.append(part)
    top, rest_lse, rest_entropy = _merge(torch.cat(parts, dim=1))
    return Picked(logits - top[:, None], rest_lse, rest_entropy, top), chain


def _view(buffer: Tensor, hidden: Tensor, classes: slice) -> Tensor:
    shape = hidden.shape[0], classes.stop - classes.start
    return buffer[: shape[0] * shape[1]].view(shape)


def _merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(top, log-sum-exp - top, entropy) [T] of rows that come in parts [T, parts, COLUMNS]."""
    maxima = parts[:, :, MAX]
    top = maxima.amax(dim=1)
    top = torch.where(top == -torch.inf, 0.0, top)
    # A part with no class alive has maximum and log-sum -inf, and weighs 0.
    below_top = maxima - top[:, None]
    mass = (below_top + parts[:, :, LOG_SUM]).exp()
    total = mass.sum(dim=1)
    log_total = total.log()
    weight = mass / torch.where(total == 0, 1.0, total)[:, None]
    centred = torch.where(weight == 0, 0.0, weight * (parts[:, :, CENTRED] + below_top))
    entropy = torch.where(total == 0, 0.0, log_total - centred.sum(dim=1))
    return top, log_total, entropy


def _picked_gradient(
    picked: Picked,
    d_logits: Tensor | None,
    chain: Tensor | None,
    live: Tensor | None,
    slope: float,
) -> Tensor:
    """Gradient [T, K] for the raw logits of the picked classes."""
    if d_logits is None:
        return torch.zeros_like(picked.logits)
    gradient = d_logits * slope
    if chain is not None:
        gradient = gradient * chain
    return gradient if live is None else torch.where(live[:, None], gradient, 0)


def _rest_gradient(
    picked: Picked,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    live: Tensor | None,
    slope: float,
) -> RestGradient | None:
    """What the row pass needs for the classes that were not picked; None where they get 0."""
    if d_lse is None and d_entropy is None:
        return None
    constant = torch.zeros_like(picked.top) if d_lse is None else d_lse * slope
    linear = None
    if d_entropy is not None:
        linear = d_entropy * -slope
        constant = constant + linear * picked.rest_entropy
    if live is not None:
        constant = torch.where(live, constant, 0)
        linear = None if linear is None else torch.where(live, linear, 0)
    lse = torch.where(picked.rest_lse == -torch.inf, 0.0, picked.rest_lse)
    return RestGradient(picked.top, lse, constant, linear)


def _fp16_scale(*factors: Tensor | None) -> Tensor:
    """A power of two that brings the largest factor of dz to about 32.

    fp16 has no numbers below 6e-8, and the probabilities of a large vocabulary times the weight of
    one token among many are down there.
    """
    present = [factor for factor in factors if factor is not None]
    sizes = torch.cat([factor.abs().flatten() for factor in present])
    sizes = torch.nan_to_num(sizes, nan=0.0, posinf=0.0)
    largest = torch.cat([sizes, sizes.new_full((1,), 2.0**-100)]).amax()
    return 32.0 / torch.exp2(torch.floor(torch.log2(largest)))


def _gradients(
    operands: tuple[Tensor, Tensor, Tensor | None],
    ids: Tensor,
    picked_dz: Tensor,
    rest: RestGradient | None,
    call: _Call,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [T, D], weight [V, D] and bias [V]; None where not wanted."""
    hidden, weight, bias = operands
    logits_dtype = matmul.logits_dtype(hidden.dtype)
    scale = None
    if call.dz_dtype == torch.float16:
        linear = None if rest is None else rest.linear
        scale = _fp16_scale(picked_dz, None if rest is None else rest.constant, linear)
        picked_dz = picked_dz * scale
        if rest is not None:
            linear = None if linear is None else linear * scale
            rest = rest._replace(constant=rest.constant * scale, linear=linear)
    hidden_sum = torch.zeros_like(hidden, dtype=logits_dtype) if wanted[0] else None
    weight_grad = torch.empty_like(weight) if wanted[1] else None
    if weight_grad is not None:
        weight_grad[call.classes :].zero_()
    bias_sum = weight.new_zeros(weight.shape[0], dtype=logits_dtype) if wanted[2] else None

    size = hidden.shape[0] * call.tile
    z_buffer = torch.empty(size, dtype=logits_dtype, device=hidden.device)
    dz_buffer = z_buffer
    if call.dz_dtype != logits_dtype:
        dz_buffer = torch.empty(size, dtype=call.dz_dtype, device=hidden.device)
    for classes in call.tiles():
        z, dz = (_view(buffer, hidden, classes) for buffer in (z_buffer, dz_buffer))
        tile_weight = weight[classes]
        if rest is not None:
            matmul.project(hidden, tile_weight, z)
        tile_bias = None if bias is None else bias[classes]
        call.rows.tile_gradient_(
            z, tile_bias, call.transform, ids, classes.start, picked_dz, rest, dz
        )
        if hidden_sum is not None:
            matmul.hidden_gradient(dz, tile_weight, hidden_sum, alpha=1.0, accumulate=True)
        if weight_grad is not None:
            out = weight_grad[classes]
            total = out if scale is None else torch.empty_like(out, dtype=logits_dtype)
            matmul.weight_gradient(dz, hidden, total, alpha=1.0, accumulate=False)
            if scale is not None:
                out.copy_(total / scale)
        if bias_sum is not None:
            # In fp32 the sum would round as often as there are tokens.
            bias_sum[classes] = dz.sum(0, dtype=torch.float64)
    if scale is not None:
        hidden_sum = None if hidden_sum is None else hidden_sum / scale
        bias_sum = None if bias_sum is None else bias_sum / scale
    return (
        None if hidden_sum is None else hidden_sum.to(hidden.dtype),
        weight_grad,
        None if bias_sum is None or bias is None else bias_sum.to(bias.dtype),
    )
