"""Output heads that are DTensors, as plain tensors on each rank, with gradients for their shards.

Only imported where an argument is a DTensor: torch.distributed.tensor takes long to import.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from esr_kernels.common import matmul


class GatheredHead(NamedTuple):
    """What an op computes with in place of a sharded head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    weight_grad: Tensor | None


def gathered_head(
    names: tuple[str, str, str],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_grad: Tensor | None = None,
) -> GatheredHead:
    """The whole head on this rank, in the dtype that is computed in.

    That is the dtype of the hidden states, or of autocast: FSDP2 stores fp32 shards, and computes
    in `MixedPrecisionPolicy.param_dtype`. The weight is cast before it is sent.

    The gradient of a shard is, summed in fp32 over the ranks:
    - where `hidden` is a plain tensor, each rank's own tokens: the mean over the ranks, as FSDP2
      has it for all other parameters;
    - where it is a replicated DTensor, the same tokens on every rank: the gradient itself.

    `names` are the caller's for hidden, weight and bias.
    """
    _check_eager()
    same_tokens = isinstance(hidden, DTensor)
    hidden = replicated(names[0], hidden)
    dtype = _computed_in(hidden)
    if weight_grad is not None and isinstance(weight, DTensor):
        weight, weight_grad = _adding_to(weight, weight_grad, dtype, same_tokens, names[1])
    weight = gathered(names[1], weight, dtype, same_tokens)
    if bias is not None:
        bias = gathered(names[2], bias, dtype, same_tokens)
    return GatheredHead(hidden, weight, bias, weight_grad)


def replicated(name: str, tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor that every rank of its mesh has as a whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(type(placement) is not Replicate for placement in tensor.placements):
        raise ValueError(
            f"{name} must be the same on all ranks where it is a DTensor, got placements "
            f"{list(tensor.placements)}; redistribute it to Replicate(), or, where each rank has "
            "tokens of its own, pass to_local()"
        )
    return tensor.to_local()


def gathered(name: str, tensor: Tensor, dtype: torch.dtype, same_tokens: bool) -> Tensor:
    """The whole of a tensor that may be a DTensor; see `gathered_head` for the gradient."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        cast: Any = tensor.detach().to(dtype)
        whole: Tensor = cast.full_tensor()
        return whole
    _check_reducible(name, tensor)
    return _Gather.apply(tensor, dtype, same_tokens, None, None)  # type: ignore[no-any-return]


def _adding_to(
    weight: DTensor, weight_grad: Tensor, dtype: torch.dtype, same_tokens: bool, name: str
) -> tuple[Tensor, Tensor]:
    """(the gathered weight, the memory that the op adds its gradient to), from which the backward
    adds this rank's part of the reduced gradient to `weight_grad`."""
    check_weight_grad(weight, weight_grad, name)
    _check_reducible(name, weight)
    whole = torch.zeros(weight.shape, dtype=matmul.logits_dtype(dtype), device=weight.device)
    return _Gather.apply(weight, dtype, same_tokens, weight_grad, whole), whole


def check_weight_grad(weight: DTensor, weight_grad: Tensor, name: str) -> None:
    """Raise unless `weight_grad` is sharded as the weight is."""
    like = isinstance(weight_grad, DTensor) and (
        weight_grad.device_mesh == weight.device_mesh
        and weight_grad.placements == weight.placements
        and weight_grad.shape == weight.shape
    )
    if not like or weight_grad.dtype != matmul.logits_dtype(weight.dtype):
        raise ValueError(
            f"weight_grad must be a DTensor of {matmul.logits_dtype(weight.dtype)} with the shape, "
            f"mesh and placements of {name}, {list(weight.shape)} and {list(weight.placements)}"
        )
    if not (weight.requires_grad and torch.is_grad_enabled()):
        raise ValueError(f"{name} must require a gradient where it is a DTensor with weight_grad")


def _check_reducible(name: str, tensor: DTensor) -> None:
    if not all(type(placement) in (Replicate, Shard) for placement in tensor.placements):
        raise ValueError(
            f"{name} must have placements Shard or Replicate to get a gradient, got "
            f"{list(tensor.placements)}; with FSDP2 compute the loss inside of the wrapped "
            "forward, where it has been gathered"
        )


def _check_eager() -> None:
    if torch.compiler.is_compiling():
        raise TypeError(
            "a DTensor cannot be gathered under torch.compile: leave this call out of the graph, "
            "or compute the loss inside of the wrapped forward, where FSDP2 has gathered the head"
        )


def _computed_in(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Gather(torch.autograd.Function):
    """DTensor -> the whole plain tensor. The backward is one reduction to the shards."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, sharded: DTensor, dtype, same_tokens: bool, weight_grad: DTensor | None, whole
    ) -> Tensor:
        ctx.like = sharded.device_mesh, sharded.placements, sharded.dtype
        ctx.same_tokens, ctx.weight_grad, ctx.whole = same_tokens, weight_grad, whole
        ctx.set_materialize_grads(False)
        cast: Any = sharded.to(dtype)
        return cast.full_tensor()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        # With `weight_grad` the op has added the gradient to `whole`, and returns none.
        total = ctx.whole if gradient is None else gradient
        if total is None:
            return None, None, None, None, None
        mesh, placements, dtype = ctx.like
        wide = total.to(matmul.logits_dtype(total.dtype))
        here: Any = Replicate() if ctx.same_tokens else Partial()
        reduced = DTensor.from_local(wide, mesh, [here] * mesh.ndim, run_check=False)
        reduced = reduced.redistribute(mesh, placements)
        if not ctx.same_tokens:
            reduced = reduced / mesh.size()
        if ctx.weight_grad is None:
            return reduced.to(dtype), None, None, None, None
        ctx.weight_grad.to_local().add_(reduced.to_local())
        ctx.whole.zero_()  # for another backward
        return None, None, None, None, None
