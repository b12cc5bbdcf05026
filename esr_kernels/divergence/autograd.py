"""Two autograd functions, one for each way to compute gradients, for eager code.

`compiled` has the operators for torch.compile. Eager calls do not use them: an autograd function
can scale the stashed gradient in place, and costs less to call.

The arguments of both are the three operands that may be trained, and `Work`: autograd need not look
at what has no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esr_kernels.common.arguments import can_read_values
from esr_kernels.divergence.call import Call, Gradients, Operands, Wanted
from esr_kernels.divergence.recompute import recompute_backward, recompute_forward
from esr_kernels.divergence.stash import stash_forward
from esr_kernels.divergence.statistics import RowNormalizers


def _refuse_double_backward() -> None:
    # Autograd enables gradients during a backward pass only for create_graph=True.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence has no double backward (create_graph=True); "
            "use impl='reference' for second derivatives"
        )


def _scale_(gradient: Tensor, upstream: Tensor, by_kernel: bool) -> None:
    if by_kernel and gradient.is_contiguous() and gradient.dtype.itemsize <= 4:
        from esr_kernels.common.scale_triton import scale_  # Triton may not be installed.

        scale_(gradient, upstream)
    else:
        # A factor with as many dimensions makes PyTorch multiply in fp32. A 0-d factor would be
        # rounded to 16 bits first, and overflow at a loss scale of 2**16.
        gradient.mul_(upstream.view((1,) * gradient.dim()))


def _add_scaled_(total: Tensor, gradient: Tensor, upstream: Tensor, by_kernel: bool) -> None:
    if by_kernel and total.is_contiguous() and total.dtype.itemsize <= 4:
        from esr_kernels.common.scale_triton import add_scaled_  # Triton may not be installed.

        add_scaled_(total, gradient, upstream)
    else:
        total.addcmul_(gradient, upstream.to(gradient.dtype))


class Work(NamedTuple):
    """One call, and where its results besides the loss go."""

    call: Call
    operands: Operands
    active: Tensor | None  # [n] int64 rows to compute, None for all
    row_weight: Tensor | None
    weight_grad: Tensor | None
    fields: list[Tensor]  # to which the fields after `loss` are added


class StashFunction(torch.autograd.Function):
    """Computes the gradient in the forward; the backward scales it by the upstream scalar."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work):  # type: ignore[no-untyped-def]
        call, x, active, row_weight, weight_grad, fields = work
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        wanted = Wanted(of_hidden, of_weight or weight_grad is not None, of_bias)
        (loss, *rest), gradients = stash_forward(call, active, row_weight, x, wanted)
        ctx.save_for_backward(*gradients)
        ctx.weight_grad, ctx.by_kernel = weight_grad, call.plan.problem.rows == "triton"
        ctx.spent = False
        ctx.set_materialize_grads(False)
        fields += rest
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        if upstream is None:
            return _input_gradients()
        _refuse_double_backward()
        if ctx.spent:
            raise RuntimeError(
                "linear_divergence with plan='stash' supports one backward pass: its gradient was "
                "scaled in place. Use plan='recompute' to backward twice through one graph"
            )
        ctx.spent = True
        gradients = Gradients(*ctx.saved_tensors)
        if ctx.weight_grad is not None:
            # Not in the forward: the factor is known only now, and checkpointing runs the forward
            # twice.
            by_kernel = ctx.by_kernel and not can_read_values(upstream)
            _add_scaled_(ctx.weight_grad, gradients.weight, upstream, by_kernel)
            gradients = gradients._replace(weight=None)
        # Reading the factor would synchronise a GPU; on CPU it saves a pass over the gradients.
        if not can_read_values(upstream) or upstream.item() != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    _scale_(gradient, upstream, ctx.by_kernel)
        return _input_gradients(gradients)


class RecomputeFunction(torch.autograd.Function):
    """Saves a few floats a token; the backward projects again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, work):  # type: ignore[no-untyped-def]
        call, x, active, row_weight, weight_grad, fields = work
        (loss, *rest), normalizers = recompute_forward(call, active, row_weight, x)
        ctx.save_for_backward(active, row_weight, *normalizers, *x)
        # Not among the saved tensors: other calls add to it before this one's backward.
        ctx.weight_grad, ctx.call = weight_grad, call
        ctx.set_materialize_grads(False)
        fields += rest
        return loss

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[no-untyped-def]
        if upstream is None:
            return _input_gradients()
        _refuse_double_backward()
        active, row_weight, *saved = ctx.saved_tensors
        gradients = recompute_backward(
            ctx.call,
            active,
            row_weight,
            Operands(*saved[len(RowNormalizers._fields) :]),
            RowNormalizers(*saved[: len(RowNormalizers._fields)]),
            upstream,
            Wanted(*ctx.needs_input_grad[:3]),
            ctx.weight_grad,
        )
        return _input_gradients(gradients)


_NO_GRADIENTS = Gradients(None, None, None)


def _input_gradients(gradients: Gradients = _NO_GRADIENTS) -> tuple[Tensor | None, ...]:
    return *gradients, None
