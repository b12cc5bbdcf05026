"""Checks of the sampler's arguments; each error names the argument."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from esr_kernels.common.arguments import FLOATS, check_tensor
from esr_kernels.common.transform import LogitTransform
from esr_kernels.sampling.params import Classes, SamplingParams
from esr_kernels.sampling.philox import SampleKeys


def check_logits(logits: Tensor) -> None:
    """Raise unless `logits` is a floating-point matrix with a class or more."""
    check_tensor("logits", logits, dtypes=FLOATS, shape=("rows", "classes"))
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {list(logits.shape)}")


def check_keys(keys: SampleKeys, like: Tensor) -> SampleKeys:
    """Raise unless `keys` name a row for each of `like`."""
    if not isinstance(keys, SampleKeys):
        raise TypeError(f"keys must be SampleKeys(seed, rows, step), got {type(keys).__name__}")
    seed, rows, step = keys
    batch = like.shape[0]
    if isinstance(seed, Tensor):
        _check_int64("keys.seed", seed, [(1,)], like)
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"keys.seed must be an int or a tensor, got {type(seed).__name__}")
    elif not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"keys.seed must be from -2**63 to 2**64 - 1, got {seed}")
    _check_int64("keys.rows", rows, [(batch,)], like)
    if isinstance(step, Tensor):
        _check_int64("keys.step", step, [(), (1,), (batch,)], like)
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"keys.step must be an int or a tensor, got {type(step).__name__}")
    elif step < 0:
        raise ValueError(f"keys.step must not be negative, got {step}")
    return SampleKeys(*keys)


def _check_int64(name: str, value: Tensor, shapes: list[tuple[int, ...]], like: Tensor) -> None:
    check_tensor(name, value, dtypes=(torch.int64,), like=like)
    if tuple(value.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {list(value.shape)}")


def check_rows(params: SamplingParams, like: Tensor) -> None:
    """Raise unless every tensor among the parameters has a value for each row."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams(...), got {params!r}")
    for name in (field.name for field in fields(params)):
        value = getattr(params, name)
        if isinstance(value, Tensor) and (
            value.shape != (like.shape[0],) or value.device != like.device
        ):
            raise ValueError(
                f"{name} must be a number or have shape [{like.shape[0]}] on {like.device}, "
                f"got {list(value.shape)} on {value.device}"
            )


def _checked_invalid(invalid: Tensor | None, like: Tensor, rows_of_head: int) -> Tensor | None:
    """None, a bool mask [V] or int64 ids, checked."""
    if invalid is None:
        return None
    is_mask = isinstance(invalid, Tensor) and invalid.dtype == torch.bool
    shape = (rows_of_head,) if is_mask else ("ids",)
    check_tensor("invalid", invalid, dtypes=(torch.bool, torch.int64), shape=shape, like=like)
    if is_mask:
        return invalid
    if like.device.type == "cpu" and len(invalid):
        lowest, highest = int(invalid.min()), int(invalid.max())
        if lowest < 0 or highest >= rows_of_head:
            bad = lowest if lowest < 0 else highest
            raise ValueError(f"invalid must hold ids from 0 to {rows_of_head - 1}, got {bad}")
    return invalid


def checked_classes(
    count: int,
    like: Tensor,
    rows_of_head: int,
    bias: Tensor | None,
    transform: LogitTransform,
    invalid: Tensor | None,
    *,
    mask: bool,
) -> Classes:
    """The first `count` classes, the invalid ones as a mask if `mask`, else as ids on CPU."""
    removed = _checked_invalid(invalid, like, rows_of_head)
    if removed is not None:
        if removed.dtype != torch.bool:
            ids = removed
            removed = torch.zeros(rows_of_head, dtype=torch.bool, device=like.device)
            removed.index_fill_(0, ids, True)
        removed = removed[:count]
        if like.device.type == "cpu" and not mask:  # ids of a few columns are faster to fill
            removed = removed.nonzero()[:, 0]
    return Classes(count, None if bias is None else bias[:count].detach(), transform, removed)
