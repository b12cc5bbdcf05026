"""Bytes of activations, counted on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface

from esr_train.models import decoder


def saved_bytes(model: Any, rows: int, width: int) -> int:
    """Bytes that autograd keeps of a forward pass of the decoder, without parameters.

    The pass runs on the meta device, with gradient checkpointing switched off, and `sdpa` replaced
    by what a fused attention keeps: queries, keys and values of all heads, output, log-sum-exp.
    """
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes(), tensor
        return tensor

    config = model.config.get_text_config(decoder=True)
    attention = config._attn_implementation
    if attention != "eager":
        config._attn_implementation = _ATTENTION
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(model)(
                input_ids=torch.zeros(rows, width, dtype=torch.int64, device="meta"),
                attention_mask=torch.ones(rows, 1, width, width, dtype=torch.bool, device="meta"),
                use_cache=False,
            )
    finally:
        config._attn_implementation = attention
    return sum(size for size, _ in found.values())


class _FusedAttention(torch.autograd.Function):
    """Shapes only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, width, _ = query.shape
        output = query.new_empty(rows, width, heads, value.shape[-1])
        lse = query.new_empty(rows, heads, width, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse)
        return output


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    each = query.shape[1] // key.shape[1]
    spread = (tensor.repeat_interleave(each, dim=1) for tensor in (key, value))
    output: Tensor = _FusedAttention.apply(query, *spread)
    return output, None


_ATTENTION = "esr_estimate"
AttentionInterface.register(_ATTENTION, _attend)
