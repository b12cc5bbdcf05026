"""Random calls of the public ops: any shapes, strides, dtypes and options that they allow.

A number decides a call. `draw(seed)` makes it, `tests/kernels/test_fuzz.py` checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esr_kernels import (
    JSD,
    KLMix,
    SampleKeys,
    SamplingParams,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    group_rows,
    linear_divergence,
    linear_topk_divergence,
    plan_linear_divergence,
    sample_from_hidden,
    sample_from_logits,
    shared_prefix_attention,
    token_logprob,
)
from esr_kernels.attention.groups import RowGroups
from tests.kernels import cases
from tests.kernels.fuzz_dice import (
    NARROW,
    Call,
    Dice,
    any_bias,
    any_dim,
    any_dtype,
    any_impl,
    any_operands,
    any_removed,
    any_sizes,
    any_token_weights,
    any_transform,
)


def _divergence(dice: Dice) -> Any:
    share = dice.between(0.02, 0.98)
    named = ["forward_kl", "reverse_kl", "jeffreys", "jsd", "skew_forward_kl", "total_variation"]
    drawn = [KLMix(share, 1 - share), JSD(share), SkewForwardKL(share), SkewReverseKL(share)]
    return dice.one([*named, *drawn, TotalVariation()])


def _vocabularies(dice: Dice, classes: int) -> tuple[int, int, dict[str, Any], tuple[Tensor, ...]]:
    """Rows of both heads, options that say which are shared, and those rows of each head."""
    more = [dice.maybe(0.5, lambda: dice.size(0, 60)) or 0 for _ in range(2)]
    rows = classes + more[0], classes + more[1]
    if dice.chance(0.25):
        shared = tuple(dice.some(classes, of) for of in rows)
        ids = dict(zip(("student_ids", "teacher_ids"), map(dice.laid_out, shared), strict=True))
        return *rows, ids, shared
    # Without a number there is a warning where the heads differ by more than a tenth.
    options = {} if rows[0] == rows[1] == classes and dice.chance(0.5) else {"num_classes": classes}
    return *rows, options, (torch.arange(classes),) * 2


def _groups_to_merge(
    dice: Dice, rows: tuple[int, int], shared: tuple[Tensor, ...]
) -> dict[str, list[int]]:
    merged = dice.some(dice.size(0, min(5, len(shared[0]))), len(shared[0]))
    groups = []
    for count, own in zip(rows, shared, strict=True):
        alone = torch.ones(count, dtype=torch.bool)
        alone[own] = False
        others = alone.nonzero()[:, 0]
        others = others[dice.some(dice.size(0, min(3, len(others))), len(others))]
        members = torch.cat([own[merged], others])
        groups.append(members[dice.some(len(members), len(members))].tolist())
    if not all(groups):
        return {}
    return {"merge_student_ids": groups[0], "merge_teacher_ids": groups[1]}


def _how_to_plan(dice: Dice, call: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """A kind, a tight or generous budget, or a plan made before."""
    kinds = ["auto", "recompute"]
    if call["reduction"] != "none":
        kinds.append("stash")
    if call["impl"] == "triton" and not sizes["ids"]:
        kinds.append("fused")
    kind = dice.one(kinds)
    if dice.chance(0.4):
        return {"plan": kind}
    more = dice.one([0, 0, 1, 3])
    for bits in range(10, 44):
        try:
            plan_linear_divergence(**sizes, plan=kind, memory_budget=1 << bits)
        except ValueError:
            continue
        budget = 1 << bits + more
        if dice.chance(0.5):
            return {"plan": plan_linear_divergence(**sizes, plan=kind, memory_budget=budget)}
        return {"plan": kind, "memory_budget": budget}
    raise AssertionError("no budget suffices")


def divergence_call(dice: Dice) -> Call:
    impl, divergence = any_impl(dice), _divergence(dice)
    tokens, classes = any_sizes(dice, impl)
    dtype = any_dtype(dice, impl)
    teacher_dtype = dtype if dtype == torch.float64 else dice.one([dtype, *NARROW])
    dims = any_dim(dice, impl), any_dim(dice, impl)
    student_rows, teacher_rows, options, shared = _vocabularies(dice, classes)
    student = any_operands(dice, tokens, student_rows, dims[0], dtype)
    teacher = any_operands(dice, tokens, teacher_rows, dims[1], teacher_dtype)
    if dice.chance(0.3) and student_rows == teacher_rows and "student_ids" not in options:
        dims = dims[0], dims[0]
        near = student[0] + dice.one([0.0, 1e-3, 0.1]) * dice.normal(*student[0].shape)
        teacher = dice.laid_out(near.to(teacher_dtype)), student[1].to(teacher_dtype)
    merge = dice.maybe(0.2, lambda: _groups_to_merge(dice, (student_rows, teacher_rows), shared))
    reduction = dice.one(["sum", "mean", "none"])
    options |= {"divergence": divergence, "impl": impl, "reduction": reduction, **(merge or {})}
    if dice.chance(0.5):
        options["token_weights"] = any_token_weights(dice, tokens, reduction)
        options["compact"] = dice.one([None, True, False])
    if dice.chance(0.3):
        options["temperature"] = dice.between(0.4, 3.0)
    if dice.chance(0.2):
        options["teacher_temperature"] = dice.between(0.4, 3.0)
    for side in ("student", "teacher"):
        options |= {f"{side}_{name}": value for name, value in any_transform(dice).items()}
    spared = dice.some(max(1, classes // 10), classes)
    if merge:
        # Autograd of a log-sum-exp over removed classes only is NaN.
        members = torch.isin(shared[0], torch.tensor(merge["merge_student_ids"]))
        spared = torch.cat([spared, members.nonzero()[:, 0]])
    # Removed from both models; one of them alone would make some divergences infinite.
    gone = dice.maybe(0.25, lambda: any_removed(dice, classes, spared))
    for side, rows, own in zip(
        ("student", "teacher"), (student_rows, teacher_rows), shared, strict=True
    ):
        if gone is not None or dice.chance(0.3):
            removed = None if gone is None else torch.zeros(rows, dtype=torch.bool)
            if removed is not None and gone is not None:
                removed[own] = gone
            scale = options.get(f"{side}_logit_scale", 1.0)
            options[f"{side}_bias"] = any_bias(dice, rows, dtype, removed, scale)
    if dice.chance(0.4):
        labels = spared[dice.integers(0, len(spared), (tokens,))]
        labels[torch.rand(tokens, generator=dice.noise) < 0.2] = -100
        options["labels"] = dice.laid_out(labels)
        options["label_weight"] = dice.one([0.0, 0.3, 1.0, -0.2])
    operands = ("student_hidden", "student_weight", "student_bias")
    trained = [name for name in operands if dice.chance(0.8)]
    trained = [name for name in trained if name != "student_bias" or name in options]
    sizes = {
        "tokens": tokens,
        "classes": classes,
        "student_dim": dims[0],
        "teacher_dim": dims[1],
        "divergence": divergence,
        "dtype": dtype,
        "device": cases.DEVICE,
        "reduction": reduction,
        "ids": "student_ids" in options,
        "impl": impl,
        **(merge or {}),
        **{f"train_{name}": f"student_{name}" in trained for name in ("hidden", "weight", "bias")},
    }
    if "student_weight" in trained and dice.chance(0.3):
        sizes["weight_grad"] = True
        options["weight_grad"] = torch.zeros(
            student_rows, dims[0], dtype=torch.promote_types(dtype, torch.float32)
        )
    options |= _how_to_plan(dice, options, sizes)
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    arguments = dict(zip(names, (*student, *teacher), strict=True)) | options
    factor = dice.normal(*((tokens,) if reduction == "none" else ()))
    return Call(
        linear_divergence,
        arguments,
        trained,
        {"loss": factor},
        operands,
        ["student_hidden", "teacher_hidden"],
    )


def _one_head(dice: Dice, prefix: str = "") -> tuple[dict[str, Any], list[str], Tensor]:
    """Operands and options of an op on one head, the names of those that are trained, and classes
    of a probability above 0."""
    impl = any_impl(dice)
    rows, classes = any_sizes(dice, impl)
    dtype, padding = any_dtype(dice, impl), dice.maybe(0.3, lambda: dice.size(1, 40)) or 0
    own = (f"{prefix}hidden", f"{prefix}weight")
    operands = any_operands(dice, rows, classes + padding, any_dim(dice, impl), dtype)
    arguments = dict(zip(own, operands, strict=True)) | any_transform(dice) | {"impl": impl}
    if padding or dice.chance(0.1):
        arguments["num_classes"] = classes
    if dice.chance(0.3):
        arguments["temperature"] = dice.between(0.4, 3.0)
    spared = dice.some(max(1, classes // 10), classes)
    if dice.chance(0.4):
        gone = dice.maybe(0.5, lambda: any_removed(dice, classes + padding, spared))
        arguments["bias"] = any_bias(
            dice, classes + padding, dtype, gone, arguments.get("logit_scale", 1.0)
        )
        spared = spared if gone is not None else torch.arange(classes)
    else:
        spared = torch.arange(classes)
    if dice.chance(0.3):
        row = (classes + padding) * (8 if dtype == torch.float64 else 4)
        # Two buffers of a tile of the fewest classes for all rows.
        arguments["memory_budget"] = max(row, 1 << 12) * max(rows, 1) * dice.one([2, 3, 8])
    trained = [name for name in (*own, "bias") if name in arguments and dice.chance(0.8)]
    return arguments, trained, spared


def token_logprob_call(dice: Dice) -> Call:
    arguments, trained, spared = _one_head(dice)
    rows = arguments["hidden"].shape[0]
    tokens = spared[dice.integers(0, len(spared), (rows,))]
    tokens[torch.rand(rows, generator=dice.noise) < dice.one([0.0, 0.3, 1.0])] = -100
    arguments["tokens"] = dice.laid_out(tokens)
    fields = [name for name in ("logprob", "entropy", "lse") if dice.chance(0.7)] or ["logprob"]
    upstream = {name: dice.normal(rows) for name in fields}
    return Call(token_logprob, arguments, trained, upstream, rows=["hidden"])


def topk_call(dice: Dice) -> Call:
    arguments, trained, spared = _one_head(dice, "student_")
    rows = arguments["student_hidden"].shape[0]
    k = dice.size(1, min(64, len(spared)))
    logits = dice.one([1.0, 5.0]) * dice.normal(rows, len(spared))
    top = logits.log_softmax(1).topk(k)
    ids, logprobs = spared[top.indices], top.values.to(dice.one(NARROW))
    if dice.chance(0.3):
        ids[torch.rand(rows, k, generator=dice.noise) < 0.3] = -1
    tail, reduction = dice.one(["bucket", "renormalise"]), dice.one(["sum", "mean", "none"])
    if tail == "bucket":
        # 16 bits can round a mass to above 1, which the op refuses from a thousandth on.
        logprobs = logprobs - 0.02 if logprobs.dtype != torch.float32 else logprobs
    arguments |= {
        "teacher_ids": dice.laid_out(ids),
        "teacher_logprobs": dice.laid_out(logprobs),
        "divergence": dice.one(["forward_kl", "reverse_kl"]),
        "tail": tail,
        "reduction": reduction,
    }
    if dice.chance(0.5):
        arguments["token_weights"] = any_token_weights(dice, rows, reduction)
    factor = dice.normal(*((rows,) if reduction == "none" else ()))
    names = ("student_hidden", "student_weight", "bias")
    rows_of = ["student_hidden"]
    return Call(linear_topk_divergence, arguments, trained, {"loss": factor}, names, rows_of)


def _sampling(dice: Dice, rows: int, classes: int) -> tuple[SampleKeys, SamplingParams]:
    step: Any = dice.one([0, 3, 1 << 40])
    if dice.chance(0.3):
        step = dice.laid_out(dice.integers(0, 99, (rows,)))
    seed = dice.one([0, 7, (1 << 64) - 1, -(1 << 63)])
    keys = SampleKeys(seed, dice.laid_out(dice.integers(0, 1 << 40, (rows,))), step)

    def each(number: Callable[[], float], off: float, dtype: torch.dtype = torch.float32) -> Any:
        if dice.chance(0.4):
            return off
        if dice.chance(0.5):
            return number()
        values = [off if dice.chance(0.3) else number() for _ in range(rows)]
        return dice.laid_out(torch.tensor(values, dtype=dtype))

    params = SamplingParams(
        each(lambda: dice.one([0.0, dice.between(0.05, 3.0)]), 1.0),
        each(lambda: dice.size(1, classes + 5), 0, torch.int64),
        each(lambda: dice.between(0.05, 0.999), 1.0),
        each(lambda: dice.between(0.0, 0.5), 0.0),
    )
    return keys, params


def sampling_call(dice: Dice) -> Call:
    arguments, _, _ = _one_head(dice)
    arguments.pop("temperature", None)
    if "softcap" in arguments:
        arguments["softcap"] = max(20.0, arguments["softcap"])
    hidden, weight = arguments["hidden"], arguments["weight"]
    count = weight.shape[0]
    logits = hidden.double() @ weight.double().T
    if logits.numel() and float(logits.abs().max()) > 40:
        arguments.pop("softcap", None)  # saturated, it makes classes equal in fp32 but not in fp64
    keys, params = _sampling(dice, hidden.shape[0], arguments.get("num_classes", count))
    arguments |= {"keys": keys, "params": params}
    if dice.chance(0.3):
        ids = dice.some(dice.size(0, count), count)
        mask = torch.zeros(count, dtype=torch.bool)
        mask[ids] = True
        arguments["invalid"] = dice.laid_out(dice.one([ids, mask]))
    if dice.chance(0.5):
        return Call(sample_from_hidden, arguments, rows=["hidden"])
    for name in ("hidden", "weight", "memory_budget"):
        arguments.pop(name, None)
    logits = dice.laid_out(logits.to(hidden.dtype))
    return Call(sample_from_logits, {"logits": logits, **arguments}, rows=["logits"])


def attention_call(dice: Dice) -> Call:
    impl = any_impl(dice)
    small = impl == "triton"
    dtype, dim = any_dtype(dice, impl), dice.size(1, 40 if small else 256)
    prompts, kv_heads = dice.size(1, 4), dice.size(1, 4)
    heads = kv_heads * dice.size(1, 5)
    length, own = (dice.size(0, 70 if small else 1000) for _ in range(2))
    if dice.chance(0.5):
        groups, batch = None, prompts * dice.size(0, 3 if small else 10)
    else:
        batch = dice.size(0, 9 if small else 40)
        groups = group_rows([dice.rolls.randrange(prompts) for _ in range(batch)], prompts)
        groups = RowGroups(*map(dice.laid_out, groups))
    std = dice.one([0.3, 1.0, 4.0])

    def cache(count: int, most: int, least: int) -> tuple[Tensor, Tensor, Tensor]:
        key, value = (dice.normal(count, kv_heads, most, dim) for _ in range(2))
        lengths = dice.integers(dice.one([0, min(least, most)]), most + 1, (count,))
        return (
            dice.laid_out((std * key).to(dtype)),
            dice.laid_out(value.to(dtype)),
            dice.laid_out(lengths),
        )

    prefix, suffix = cache(prompts, length, length), cache(batch, own, 1)
    names = [f"{part}_{x}" for part in ("prefix", "suffix") for x in ("key", "value", "lengths")]
    arguments = {
        "query": dice.laid_out(dice.normal(batch, heads, dim).to(dtype)),
        **dict(zip(names, (*prefix, *suffix), strict=True)),
        "groups": groups,
        "scale": dice.maybe(0.3, lambda: dice.between(-0.5, 0.5)),
        "softcap": dice.maybe(0.3, lambda: dice.between(1.0, 50.0)),
        "window": dice.maybe(0.3, lambda: dice.size(1, length + own + 3)),
        "impl": impl,
    }
    return Call(shared_prefix_attention, arguments, rows=["query"])


def draw(seed: int) -> Call:
    """The call of this number."""
    dice = Dice(seed)
    ops = [divergence_call] * 5 + [token_logprob_call] * 2 + [topk_call] * 2
    return dice.one([*ops, sampling_call, sampling_call, sampling_call, attention_call])(dice)
