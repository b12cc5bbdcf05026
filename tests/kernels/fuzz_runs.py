"""A random call, by the op and by its reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from esr_kernels import SampleKeys, SamplingParams, shared_prefix_attention
from esr_kernels.attention import reference as attention_reference
from esr_kernels.attention.arguments import Cache, checked_options
from esr_kernels.attention.groups import RowGroups
from esr_kernels.divergence import reference as divergence_reference
from esr_kernels.scoring import reference as scoring_reference
from tests.kernels import cases
from tests.kernels.fuzz_dice import Call

REFERENCES = {
    "linear_divergence": divergence_reference.linear_divergence,
    "token_logprob": scoring_reference.token_logprob,
    "linear_topk_divergence": scoring_reference.linear_topk_divergence,
}
Results = dict[str, Tensor]


def tensors_of(call: Call) -> dict[str, Tensor]:
    found = {}
    for name, value in call.arguments.items():
        nested = value if isinstance(value, tuple) else (value,)
        if hasattr(value, "top_p"):
            nested = tuple(vars(value).values())
        found |= {f"{name}.{i}": x for i, x in enumerate(nested) if isinstance(x, Tensor)}
    return found


def _on_device(x: Any) -> Any:
    """A tensor, or a tuple or dataclass of some, on the GPU if there is one, each with the strides
    and the offset that it has."""
    if isinstance(x, Tensor):
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return storage.to(cases.DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())
    if isinstance(x, RowGroups | SampleKeys):
        return type(x)(*map(_on_device, x))
    if isinstance(x, SamplingParams):
        return replace(x, **{name: _on_device(value) for name, value in vars(x).items()})
    return x


def ours(call: Call, **changed: Any) -> Results:
    """Outputs and gradients of a call with some of its arguments replaced, computed where the
    kernels run: on a GPU if there is one."""
    arguments = call.arguments | changed
    if cases.DEVICE != "cpu":
        arguments = {name: _on_device(value) for name, value in arguments.items()}
    leaves = {name: arguments[name].detach().requires_grad_() for name in call.trained}
    buffer = arguments.get("weight_grad")
    if buffer is not None:
        arguments["weight_grad"] = buffer = torch.zeros_like(buffer)
    out = call.op(**{**arguments, **leaves})
    fields = {"out": out} if isinstance(out, Tensor) else out._asdict()
    results = _with_gradients(call, leaves, fields)
    if buffer is not None:
        assert leaves["student_weight"].grad is None
        results["d student_weight"] = buffer
    return {name: value.cpu() for name, value in results.items()}


def _with_gradients(
    call: Call, leaves: dict[str, Tensor], fields: Results, factor: float = 1.0
) -> Results:
    """`factor`: of the loss, taken back from the gradients: they are rounded elsewhere."""
    if leaves:
        upstream = [
            fields[name].mul((u * factor).to(fields[name].device)).sum()
            for name, u in call.upstream.items()
        ]
        torch.stack(upstream).sum().backward()
    gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    if factor != 1.0:
        gradients = {name: g.double() / factor for name, g in gradients.items() if g is not None}
    return {name: value.detach() for name, value in fields.items()} | {
        name: value for name, value in gradients.items() if value is not None
    }


def _shake(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.to(dtype) * (1 + torch.finfo(dtype).eps * noise)


def spec(call: Call, dtype: torch.dtype, rounds_dz: bool = False, shaken: int | None = None):
    """The reference in `dtype`. `shaken`: with the dimensions of the hidden states in another
    order and operands changed in their last bit of `dtype`, by this seed."""
    if call.op is shared_prefix_attention:
        a = call.arguments
        prefix = Cache(a["prefix_key"], a["prefix_value"], a["prefix_lengths"])
        suffix = Cache(a["suffix_key"], a["suffix_value"], a["suffix_lengths"])
        options = checked_options(a["query"].shape[2], a["scale"], a["softcap"], a["window"])
        query = a["query"] if shaken is None else _shake(a["query"], dtype, shaken)
        out = attention_reference.attend(query, prefix, suffix, a["groups"], options, dtype)
        return {"out": out}
    drop = {"impl", "plan", "memory_budget", "compact", "weight_grad"}
    arguments = {name: value for name, value in call.arguments.items() if name not in drop}
    exact = dtype == torch.float64
    leaves = {
        name: (arguments[name].to(dtype) if exact else arguments[name]).detach().clone()
        for name in call.trained
    }
    undo: dict[str, Tensor] = {}
    if shaken is not None:
        noise = torch.Generator().manual_seed(shaken)
        for side in ("", "student_", "teacher_"):
            names = [f"{side}hidden", f"{side}weight"]
            if names[0] not in arguments:
                continue
            turn = torch.randperm(arguments[names[0]].shape[1], generator=noise)
            for name in names:
                undo[name] = turn.argsort()
                moved = arguments[name][:, turn]
                if not rounds_dz:
                    moved = _shake(moved, dtype, shaken)
                arguments[name] = moved
                leaves |= {name: moved.detach().clone()} if name in leaves else {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    arguments |= leaves
    hidden, weight, bias = call.head
    if rounds_dz and arguments[hidden].dtype.itemsize < 4 and call.trained:
        behind = cases.behind_rounding(arguments[hidden], arguments[weight], arguments.get(bias))
        arguments |= dict(zip(call.head, behind, strict=True))
    fields = REFERENCES[call.op.__name__](**arguments, dtype=dtype)
    factor = 1.0 if shaken is None else 1.0 + 0.3 * shaken
    results = _with_gradients(call, leaves, fields, factor)
    for name in undo:
        if f"d {name}" in results:
            results[f"d {name}"] = results[f"d {name}"][:, undo[name]]
    return results
