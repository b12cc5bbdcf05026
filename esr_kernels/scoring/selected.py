"""Logits of a few selected classes of each row, and statistics of all others: the primitive of
`token_logprob` and `linear_topk_divergence`.

For each row of transformed logits it returns the logits of K selected classes and, of all other
classes, the log-sum-exp and the entropy of their own softmax pi. The log-probability of a token,
the entropy of a row, a tail bucket and the mass on a teacher's top-k are short formulas in these,
which autograd differentiates. The gradient of the primitive itself is written by hand:

    dz_k = d logits_k                                          for a selected class k
    dz_v = pi_v (d lse - d entropy (log pi_v + entropy))       for an unselected class v

The forward pass projects one tile of classes after another and discards its logits. The backward
pass projects the tiles again; each writes its rows of the weight gradient once and adds to an fp32
gradient of the hidden states. If the unselected classes take no gradient, it projects nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common import matmul, triton_installed
from esr_kernels.common.arguments import Head, can_read_values
from esr_kernels.common.fp16_range import fp16_scale
from esr_kernels.common.online_softmax import shares, weighted_mean
from esr_kernels.common.rows import active_rows, spread_rows, take_rows
from esr_kernels.common.tiles import TileBuffer, class_tiles, tile_width
from esr_kernels.common.transform import LogitTransform
from esr_kernels.scoring import selected_torch
from esr_kernels.scoring.tile import CENTRED, LOG_SUM, MAX, Tile, UnselectedGradient

# Fills rows with fewer than K ids.
NO_CLASS = -1


class Selected(NamedTuple):
    """Logits of the selected classes and statistics of the others, fp32 (fp64 for fp64 operands).

    `logits` and `unselected_lse` are relative to `top`: their differences keep the digits that
    adding it would round away.
    """

    logits: Tensor  # [T, K]; -inf for NO_CLASS, NaN for an id out of range
    unselected_lse: Tensor  # [T]; -inf if all classes are selected
    unselected_entropy: Tensor  # [T], nats; 0 if all classes are selected
    top: Tensor  # [T] largest unselected logit, 0 if there is none; takes no gradient


class _Operands(NamedTuple):
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]

    def tile(self, classes: slice, buffer: TileBuffer) -> Tile:
        """A tile whose logits are not computed yet."""
        z = buffer.rows(classes.stop - classes.start)
        return Tile(z, None if self.bias is None else self.bias[classes], classes.start)


@dataclass(frozen=True)
class _Call:
    op: str  # the public name, for errors
    transform: LogitTransform
    classes: int
    tile_width: int
    passes: ModuleType
    logits_dtype: torch.dtype
    dz_dtype: torch.dtype

    def buffer(self, name: str, hidden: Tensor, dtype: torch.dtype) -> TileBuffer:
        return TileBuffer(name, hidden.shape[0], self.tile_width, hidden.device, dtype)


def select_classes(
    head: Head,
    ids: Tensor,
    live: Tensor | None,
    *,
    op: str,
    impl: str,
    memory_budget: int | None,
) -> Selected:
    """Select the classes `ids` [T, K] of each row, distinct in a row except for NO_CLASS.

    Rows where `live` [T] is False have outputs and gradients of 0, even if they are NaN. On CPU,
    where counting them does not synchronise, they are not computed.
    """
    passes = _row_passes(head, impl)
    logits_dtype = matmul.logits_dtype(head.hidden.dtype)
    # PyTorch's products on CPU run in fp32: rounding dz would only lose digits.
    in_fp32 = passes is selected_torch and head.hidden.device.type == "cpu"
    dz_dtype = logits_dtype if in_fp32 else head.hidden.dtype
    element_bytes = logits_dtype.itemsize + (dz_dtype != logits_dtype) * dz_dtype.itemsize
    compact = live is not None and can_read_values(live)
    active = active_rows(live, compact)
    hidden = take_rows(head.hidden, active)
    if live is not None and not compact:
        # dz of such a row is 0, and 0 * NaN must not reach the gradient of the head.
        hidden = torch.where(live[:, None], hidden, 0)
    width = tile_width(hidden.shape[0], head.classes, element_bytes, hidden.device, memory_budget)
    fields = _Select.apply(
        hidden,
        head.weight,
        head.bias,
        take_rows(ids, active).contiguous(),
        None if compact else live,
        _Call(op, head.transform, head.classes, width, passes, logits_dtype, dz_dtype),
    )
    return Selected(*(spread_rows(field, active, head.hidden.shape[0]) for field in fields))


def _row_passes(head: Head, impl: str) -> ModuleType:
    """The module that computes the row passes for `impl`."""
    on_cpu = head.hidden.device.type == "cpu" or head.hidden.dtype == torch.float64
    if impl == "torch" or (impl == "auto" and (on_cpu or not triton_installed.TRITON)):
        return selected_torch
    from esr_kernels.scoring import selected_triton

    return selected_triton


class _Select(torch.autograd.Function):
    """Saves a few floats a token; the backward pass may run any number of times."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, live, call):  # type: ignore[no-untyped-def]
        with matmul.plain_precision(hidden):
            selected, softcap_slope = _statistics(_Operands(hidden, weight, bias), ids, call)
        if live is not None:
            selected = Selected(
                torch.where(live[:, None], selected.logits, 0),
                *(torch.where(live, field, 0) for field in selected[1:]),
            )
        ctx.save_for_backward(hidden, weight, bias, ids, live, softcap_slope, *selected)
        ctx.call = call
        ctx.mark_non_differentiable(selected.top)
        ctx.set_materialize_grads(False)
        return tuple(selected)

    @staticmethod
    def backward(ctx, d_logits, d_lse, d_entropy, _):  # type: ignore[no-untyped-def]
        if d_logits is None and d_lse is None and d_entropy is None:
            return (None,) * 6
        # Autograd enables gradients during a backward pass only for create_graph=True.
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{ctx.call.op} has no double backward (create_graph=True); "
                "use impl='reference' for second derivatives"
            )
        hidden, weight, bias, ids, live, softcap_slope, *fields = ctx.saved_tensors
        selected, slope = Selected(*fields), ctx.call.transform.slope
        with matmul.plain_precision(hidden):
            gradients = _gradients(
                _Operands(hidden, weight, bias),
                ids,
                _selected_gradient(selected, d_logits, softcap_slope, live, slope),
                _unselected_gradient(selected, d_lse, d_entropy, live, slope),
                ctx.call,
                ctx.needs_input_grad[:3],
            )
        return *gradients, None, None, None


def _statistics(x: _Operands, ids: Tensor, call: _Call) -> tuple[Selected, Tensor | None]:
    """The outputs and, with a softcap, its derivative [T, K] at the selected logits."""
    # Tiles fill in the ids that they have: NO_CLASS stays -inf, an id out of range NaN.
    logits = torch.where(ids == NO_CLASS, -torch.inf, torch.nan).to(call.logits_dtype)
    softcap_slope = None if call.transform.softcap is None else torch.zeros_like(logits)
    buffer = call.buffer("logits", x.hidden, call.logits_dtype)
    parts = []
    for classes in class_tiles(call.classes, call.tile_width):
        tile = x.tile(classes, buffer)
        matmul.project(x.hidden, x.weight[classes], tile.z)
        parts.append(call.passes.tile_statistics(tile, call.transform, ids, logits, softcap_slope))
    top, lse, entropy = _merge(torch.cat(parts, dim=1))
    return Selected(logits - top[:, None], lse, entropy, top), softcap_slope


def _merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(top, log-sum-exp - top, entropy) [T] of rows whose parts are [T, parts, COLUMNS]."""
    maxima = parts[:, :, MAX]
    top = maxima.amax(dim=1)
    top = torch.where(top == -torch.inf, 0.0, top)
    below_top, weight, total = shares(maxima, parts[:, :, LOG_SUM], top)
    share = weight / torch.where(total == 0, 1.0, total)[:, None]
    mean = weighted_mean(share, parts[:, :, CENTRED] + below_top)
    lse = total.log()
    return top, lse, torch.where(total == 0, 0.0, lse - mean)


def _selected_gradient(
    selected: Selected,
    d_logits: Tensor | None,
    softcap_slope: Tensor | None,
    live: Tensor | None,
    slope: float,
) -> Tensor:
    """Gradient [T, K] of the raw logits of the selected classes."""
    if d_logits is None:
        return torch.zeros_like(selected.logits)
    gradient = d_logits * slope
    if softcap_slope is not None:
        gradient = gradient * softcap_slope
    return gradient if live is None else torch.where(live[:, None], gradient, 0)


def _unselected_gradient(
    selected: Selected,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    live: Tensor | None,
    slope: float,
) -> UnselectedGradient | None:
    """Gradient of the unselected classes without the softcap's derivative; None if it is 0."""
    if d_lse is None and d_entropy is None:
        return None
    constant = torch.zeros_like(selected.top) if d_lse is None else d_lse * slope
    linear = None
    if d_entropy is not None:
        linear = d_entropy * -slope
        constant = constant + linear * selected.unselected_entropy
    if live is not None:
        constant = torch.where(live, constant, 0)
        linear = None if linear is None else torch.where(live, linear, 0)
    lse = torch.where(selected.unselected_lse == -torch.inf, 0.0, selected.unselected_lse)
    return UnselectedGradient(selected.top, lse, constant, linear)


def _gradients(
    x: _Operands,
    ids: Tensor,
    selected_dz: Tensor,
    unselected: UnselectedGradient | None,
    call: _Call,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden [T, D], weight [V, D] and bias [V]; None where not wanted."""
    scale = None
    if call.dz_dtype == torch.float16:
        factors = () if unselected is None else (unselected.constant, unselected.linear)
        scale = fp16_scale(selected_dz, *factors)
        selected_dz = selected_dz * scale
        unselected = None if unselected is None else unselected.times(scale)
    hidden_sum = torch.zeros_like(x.hidden, dtype=call.logits_dtype) if wanted[0] else None
    weight_grad = torch.empty_like(x.weight) if wanted[1] else None
    if weight_grad is not None:
        weight_grad[call.classes :].zero_()
    bias_sum = None
    if wanted[2]:
        bias_sum = x.weight.new_zeros(x.weight.shape[0], dtype=call.logits_dtype)

    z_buffer = dz_buffer = call.buffer("logits", x.hidden, call.logits_dtype)
    if call.dz_dtype != call.logits_dtype:
        dz_buffer = call.buffer("gradient of logits", x.hidden, call.dz_dtype)
    for classes in class_tiles(call.classes, call.tile_width):
        tile, weight = x.tile(classes, z_buffer), x.weight[classes]
        dz = tile.z if dz_buffer is z_buffer else dz_buffer.rows(tile.z.shape[1])
        if unselected is not None:
            matmul.project(x.hidden, weight, tile.z)
        call.passes.tile_gradient_(tile, call.transform, ids, selected_dz, unselected, dz)
        if hidden_sum is not None:
            matmul.hidden_gradient(dz, weight, hidden_sum, alpha=1.0, accumulate=True)
        if weight_grad is not None:
            out = weight_grad[classes]
            total = out if scale is None else torch.empty_like(out, dtype=call.logits_dtype)
            matmul.weight_gradient(dz, x.hidden, total, alpha=1.0, accumulate=False)
            if scale is not None:
                out.copy_(total / scale)
        if bias_sum is not None:
            # An fp32 sum would round once a token.
            bias_sum[classes] = dz.sum(0, dtype=torch.float64)
    if scale is not None:
        hidden_sum = None if hidden_sum is None else hidden_sum / scale
        bias_sum = None if bias_sum is None else bias_sum / scale
    return (
        None if hidden_sum is None else hidden_sum.to(x.hidden.dtype),
        weight_grad,
        None if bias_sum is None or x.bias is None else bias_sum.to(x.bias.dtype),
    )
