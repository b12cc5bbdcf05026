"""Kernel launches and bytes of one decoding step, by decoder: what a GPU would be asked to do.

    python -m bench.count_decode        writes bench/results/count_decode.json

Counted, not measured: a step of each decoder runs on the CPU, operations that compute something
count as a launch each, and their operands and results as bytes; views and allocations count as
nothing. Attention counts as what its CUDA path is: for shared prompts the two kernels of
`shared_prefix_attention`, which read the keys and values up to each length once and pass partial
sums to each other; for the plain cache one fused kernel over the padded cache. One and two layers
are run with the model's real sizes, and the others follow. The head and the draw are the same for
both and left out.

One sample a prompt, prompts of unlike lengths, at the last of N tokens, in a 16-bit type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, Qwen2Config

from esr_kernels.attention import prefix_triton
from esr_train.rollout import cache
from esr_train.rollout.cache import Shape
from esr_train.rollout.decoder import PlainDecoder, SharedPrefixDecoder

_ITEM = 2  # bytes of a 16-bit element
RESULTS = Path(__file__).parent / "results" / "count_decode.json"
MODELS = {
    # hidden, intermediate, layers, heads, key heads
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2),
    "SmolLM2-135M": (576, 1536, 30, 9, 3),
}
CASES = [(16, 300, 100), (64, 300, 100), (64, 300, 1024)]  # prompts, longest, new tokens
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach")


class _Count(TorchDispatchMode):
    """Operations that compute, and the bytes of their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        operands = [value for value in torch.utils._pytree.tree_leaves(args) if _is_tensor(value)]
        results = [value for value in torch.utils._pytree.tree_leaves(out) if _is_tensor(value)]
        in_place = function._schema.is_mutable
        if function.is_view or name in _FREE or not results:
            return out
        self.launches += 1
        if in_place:  # reads its operands, and writes as much as the largest of them
            moved = [_bytes(operand) for operand in operands[1:]] or [_bytes(operands[0])]
            self.bytes += sum(moved) + max(moved)
        else:
            self.bytes += sum(map(_bytes, operands)) + sum(map(_bytes, results))
        return out

    def add(self, launches: int, size: int) -> None:
        self.launches += launches
        self.bytes += size


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _bytes(tensor: Tensor) -> int:
    """As on a GPU, where the floats here, fp32, have 16 bits. A broadcast tensor is read once."""
    size = _ITEM if tensor.is_floating_point() else tensor.element_size()
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= extent if stride else 1
    return size


def _shared_attention(count: _Count) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *own: Any, **_: Any):
        rows, heads, dim = query.shape
        prompts, kv_heads, width, _ = key.shape
        read = int(lengths.sum()) + int(own[2].sum())
        splits, _ = prefix_triton._split_keys(width, prompts * kv_heads, 64)
        partial = 2 * 4 * splits * rows * heads * (dim + 2)  # fp32, written and read
        count.add(2, _ITEM * (2 * read * kv_heads * dim + 2 * query.numel()) + partial)
        return torch.empty_like(query)

    return attend


def _plain_attention(count: _Count) -> Any:
    def attend(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
        mask = options.get("attn_mask")
        count.add(
            1,
            sum(map(_bytes, (query, key, value, query)))
            + (_bytes(mask) if mask is not None else 0),
        )
        return torch.empty_like(query)

    return attend


def _step(kind: Any, model: Any, lengths: list[int], length: int) -> _Count:
    """One step at the last token that is read, after prompts of `lengths`."""
    rows, width = len(lengths), max(lengths)
    decoder = kind(model, Shape(rows, width, rows, 1, length - 1))
    # Caches as large as after the prompts; what is in them does not matter.
    decoder.enter([[1]] * rows, list(range(rows)), list(range(rows)))
    if kind is SharedPrefixDecoder:
        decoder.cache.prompt_lengths.copy_(torch.tensor(lengths))
    decoder.arrange(list(range(rows)), rows)
    token = torch.ones(rows, dtype=torch.int64)
    if kind is PlainDecoder:
        extra = width - 1 + length - 2
        for layer in decoder.cache.layers:
            layer.keys, layer.values = (
                torch.cat([states, states.expand(-1, -1, extra, -1)], dim=2)
                for states in (layer.keys, layer.values)
            )
        at = torch.arange(width + length - 2)
        padding = width - torch.tensor(lengths)
        decoder.mask = (at >= padding[:, None]).long()
        decoder.position = decoder.mask.sum(1)
    count = _Count()
    step = torch.full_like(token, length - 2)

    def seek(self: Any, step: Tensor) -> None:
        own_seek(self, step)
        self.common_index = None  # of the CPU only

    own_seek = cache.PrefixCache.seek
    with (
        mock.patch.object(cache, "shared_prefix_attention", _shared_attention(count)),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _plain_attention(count)),
        mock.patch.object(cache.PrefixCache, "seek", seek),
        torch.no_grad(),
        count,
    ):
        decoder.step(token, step)
    return count


def counted(kind: Any, name: str, rows: int, longest: int, length: int) -> tuple[int, int]:
    """(launches, bytes) of a step of a decoder."""
    hidden, inner, layers, heads, kv_heads = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest + 1, (rows,), generator=generator).tolist()
    lengths[0] = longest
    found = []
    for depth in (1, 2):
        config = Qwen2Config(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
        model = AutoModel.from_config(config).eval()
        with torch.no_grad():
            count = _step(kind, model, lengths, length)
        found.append((count.launches, count.bytes))
    (launches, size), (launches_2, size_2) = found
    return (
        launches + (layers - 1) * (launches_2 - launches),
        size + (layers - 1) * (size_2 - size),
    )


def main() -> None:
    found = []
    for name in MODELS:
        for rows, longest, length in CASES:
            row: dict[str, Any] = {"model": name, "rows": rows, "prompt": longest, "new": length}
            for kind, decoder in (("shared", SharedPrefixDecoder), ("plain", PlainDecoder)):
                launches, size = counted(decoder, name, rows, longest, length)
                row[kind] = {"launches": launches, "mb": round(size / 1e6)}
            found.append(row)
            print(row)
    text = ",\n".join(json.dumps(row) for row in found)
    RESULTS.write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
