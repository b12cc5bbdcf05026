"""Every public op against fp64 at the size of a real vocabulary, for `gpu_suite`.

A check returns its errors and whether they are within bounds; nothing is asserted, so that one that
fails leaves the others their turn. Gradients of `linear_divergence` may err 1.5 times as much as
plain PyTorch with fp32 logits and one rounding of dz; the other ops' by what rounding dz and the
result to the operands' dtype costs. All errors are relative, in L2: zeros would have 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.peers import Operands, make_operands
from esr_kernels import (
    JSD,
    KLMix,
    SampleKeys,
    SamplingParams,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    linear_divergence,
    linear_topk_divergence,
    plan_linear_divergence,
    sample_from_hidden,
    shared_prefix_attention,
    token_logprob,
)
from esr_kernels.divergence import reference
from esr_kernels.divergence.losses import resolve_divergence
from esr_kernels.divergence.plan import Plan
from esr_kernels.scoring import reference as scoring
from tests.kernels.cases import ALLOWED_RATIO, RoundGradient, fp32_logits, relative_error

Result = dict[str, Any]  # errors by name, and "ok"
Check = tuple[str, Callable[[], Result]]

DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    KLMix(0.25, 0.75),
    JSD(0.3),
    SkewForwardKL(0.2),
    SkewReverseKL(0.2),
    TotalVariation(),
)
# Statistics are fp32 sums over the vocabulary.
_STATISTICS = 1e-5
_ROWS = 256  # at a time, where all rows' logits in fp64 would not fit
# Rounding a gradient's 16-bit operands and itself, each about a third of the dtype's eps.
_GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Size:
    """What the checks run on; `impl` is Triton on a GPU."""

    device: str
    impl: str
    tokens: int
    classes: int
    dims: tuple[int, int]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def checks(size: Size) -> Iterator[Check]:
    """(name, check) of every op and the ways to run it."""
    for dtype, divergence in product(size.dtypes, DIVERGENCES):
        for plan in ("stash", "recompute"):
            name = f"linear_divergence {divergence} {plan} {_short(dtype)}"
            yield name, partial(_linear_divergence, size, dtype, divergence, plan)
    for dtype in size.dtypes:
        yield f"token_logprob {_short(dtype)}", partial(_token_logprob, size, dtype)
        for divergence, tail in product(("forward_kl", "reverse_kl"), ("bucket", "renormalise")):
            name = f"linear_topk_divergence {divergence} {tail} {_short(dtype)}"
            yield name, partial(_topk, size, dtype, divergence, tail)
        if size.impl == "triton":
            yield f"fused statistics {_short(dtype)}", partial(_fused, size, dtype)
        yield f"sample_from_hidden {_short(dtype)}", partial(_sampler, size, dtype)
        yield f"shared_prefix_attention {_short(dtype)}", partial(_attention, size, dtype)


def large_checks(size: Size) -> Iterator[Check]:
    """A stash of one chunk, of several, and one with the teacher's logits in the gradient."""
    for dtype in size.dtypes:
        whole = plan_linear_divergence(
            size.tokens,
            size.classes,
            *size.dims,
            dtype=dtype,
            device=size.device,
            plan="stash",
            impl=size.impl,
        )
        part = max(1, size.tokens // 4)
        # So many rows of fp32 logits lie in the memory of the head's gradient.
        fits = size.dims[0] * dtype.itemsize // 4 // 2
        for name, plan in (
            ("as planned", whole),
            ("several chunks", replace(whole, token_chunk=part, logit_chunk=max(1, part // 2))),
            ("teacher_in_gradient", replace(whole, token_chunk=size.tokens, logit_chunk=fits)),
        ):
            title = f"stash, T={size.tokens}, {name} {_short(dtype)}"
            yield title, partial(_large_stash, size, dtype, plan)


@lru_cache(maxsize=1)
def _large_yardsticks(size: Size, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`_yardsticks` of reverse KL, a few rows at a time."""
    x = _operands(size, dtype)
    results = []
    for to in (torch.float64, torch.float32):
        rows: list[dict[str, Tensor]] = []
        total = torch.zeros(x.student_weight.shape, dtype=torch.float64, device=size.device)
        for start in range(0, size.tokens, _ROWS):
            some = slice(start, start + _ROWS)
            part = replace(
                x,
                student_hidden=x.student_hidden.detach()[some],
                teacher_hidden=x.teacher_hidden[some],
            )
            values = _by_autograd(part, "reverse_kl", to)
            total += values.pop("dW")
            rows.append(values)
        joined = {name: torch.cat([values[name] for values in rows]) for name in rows[0]}
        results.append({**joined, "dW": total})
    truth, plain = results
    return truth, {name: relative_error(plain[name], truth[name]) for name in truth}


def _large_stash(size: Size, dtype: torch.dtype, plan: Plan) -> Result:
    x = _operands(size, dtype)
    truth, plain = _large_yardsticks(size, dtype)
    x.clear()
    out = linear_divergence(
        x.student_hidden,
        x.student_weight,
        x.teacher_hidden,
        x.teacher_weight,
        plan=plan,
        impl=size.impl,
    )
    out.loss.backward()
    ours = {"per_token": out.per_token, "dX": x.student_hidden.grad, "dW": x.student_weight.grad}
    errors = {name: relative_error(value, truth[name]) for name, value in ours.items()}
    x.clear()
    eps = torch.finfo(torch.float32).eps
    limits = {name: max(ALLOWED_RATIO * error, 4 * eps) for name, error in plain.items()}
    # Plain PyTorch's is summed over rows in fp64 here; ours is rounded once to its dtype.
    limits["dW"] += torch.finfo(dtype).eps / 3
    return {
        **errors,
        "chunks": -(-size.tokens // plan.token_chunk),
        "teacher in gradient": plan.teacher_in_gradient,
        "ok": all(errors[name] <= limits[name] for name in errors),
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=1)
def _operands(size: Size, dtype: torch.dtype) -> Operands:
    return make_operands(size.tokens, *size.dims, size.classes, dtype=dtype, device=size.device)


def _by_autograd(x: Operands, divergence: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Per-token divergence and both gradients from logits in `dtype`, all of them held."""
    # The leaves of the truth are fp64 too: it is not rounded anywhere.
    to = torch.float64 if dtype == torch.float64 else x.student_hidden.dtype
    hidden, weight = (
        leaf.detach().clone().to(to).requires_grad_()
        for leaf in (x.student_hidden, x.student_weight)
    )
    if dtype == torch.float32:
        s = RoundGradient.apply(fp32_logits(hidden, weight), hidden.dtype)
        t = fp32_logits(x.teacher_hidden, x.teacher_weight)
    else:
        s = hidden.to(dtype) @ weight.to(dtype).T
        t = x.teacher_hidden.to(dtype) @ x.teacher_weight.to(dtype).T
    per_token = reference.divergence_of_log_probs(
        s.log_softmax(-1), t.log_softmax(-1), resolve_divergence(divergence)
    )
    per_token.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"per_token": per_token.detach(), "dX": hidden.grad, "dW": weight.grad}


@lru_cache(maxsize=1)
def _yardsticks(
    size: Size, dtype: torch.dtype, divergence: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(truth in fp64, errors of plain PyTorch)."""
    x = _operands(size, dtype)
    truth = _by_autograd(x, divergence, torch.float64)
    plain = _by_autograd(x, divergence, torch.float32)
    return truth, {name: relative_error(plain[name], truth[name]) for name in truth}


def _linear_divergence(size: Size, dtype: torch.dtype, divergence: Any, plan: str) -> Result:
    x = _operands(size, dtype)
    truth, plain = _yardsticks(size, dtype, divergence)
    x.clear()
    out = linear_divergence(
        x.student_hidden,
        x.student_weight,
        x.teacher_hidden,
        x.teacher_weight,
        divergence,
        plan=plan,
        impl=size.impl,
    )
    out.loss.backward()
    ours = {"per_token": out.per_token, "dX": x.student_hidden.grad, "dW": x.student_weight.grad}
    errors = {name: relative_error(value, truth[name]) for name, value in ours.items()}
    eps = torch.finfo(torch.float32).eps
    limits = {name: max(ALLOWED_RATIO * error, 4 * eps) for name, error in plain.items()}
    return {
        **errors,
        **{f"plain {name}": error for name, error in plain.items()},
        "ok": all(errors[name] <= limits[name] for name in errors),
    }


def _fused(size: Size, dtype: torch.dtype) -> Result:
    x = _operands(size, dtype)
    truth, _ = _yardsticks(size, dtype, "reverse_kl")
    with torch.no_grad():
        out = linear_divergence(
            x.student_hidden,
            x.student_weight,
            x.teacher_hidden,
            x.teacher_weight,
            "reverse_kl",
            plan="fused",
            impl=size.impl,
        )
    error = relative_error(out.per_token, truth["per_token"])
    return {"per_token": error, "ok": error <= _STATISTICS}


def _against_reference(
    size: Size, dtype: torch.dtype, op: Callable[..., Any], spec: Callable[..., Any], fields: list
) -> Result:
    """`op` and its reference in fp64 on the same head, gradients of a fixed mix of `fields`."""
    x = _operands(size, dtype)
    results = []
    for run, to in ((op, dtype), (spec, torch.float64)):
        leaves = [
            leaf.detach().to(to).requires_grad_() for leaf in (x.student_hidden, x.student_weight)
        ]
        out = run(*leaves)
        out = out if isinstance(out, dict) else out._asdict()
        sum((k + 1) * out[field].sum() for k, field in enumerate(fields)).backward()
        values = {field: out[field].detach() for field in fields}
        results.append({**values, "dX": leaves[0].grad, "dW": leaves[1].grad})
    errors = {name: relative_error(results[0][name], results[1][name]) for name in results[0]}
    limits = {name: _GRADIENT[dtype] if name[0] == "d" else _STATISTICS for name in errors}
    return {**errors, "ok": all(errors[name] <= limits[name] for name in errors)}


def _token_logprob(size: Size, dtype: torch.dtype) -> Result:
    tokens = torch.arange(size.tokens, device=size.device) * 31 % size.classes
    return _against_reference(
        size,
        dtype,
        lambda *head: token_logprob(*head, tokens, impl=size.impl),
        lambda *head: scoring.token_logprob(*head, tokens),
        ["logprob", "entropy"],
    )


def _topk(size: Size, dtype: torch.dtype, divergence: str, tail: str) -> Result:
    x = _operands(size, dtype)
    logits = x.teacher_hidden.float() @ x.teacher_weight.float().T
    top = logits.log_softmax(-1).topk(min(64, size.classes // 2))
    how = {"divergence": divergence, "tail": tail, "reduction": "none"}
    return _against_reference(
        size,
        dtype,
        lambda *head: linear_topk_divergence(*head, top.indices, top.values, impl=size.impl, **how),
        lambda *head: scoring.linear_topk_divergence(*head, top.indices, top.values, **how),
        ["loss"],
    )


def _sampler(size: Size, dtype: torch.dtype) -> Result:
    """The reference's tokens but where two classes are within rounding of a tie."""
    x = _operands(size, dtype)
    keys = SampleKeys(7, torch.arange(size.tokens, device=size.device), 3)
    worst, same = 0.0, 1.0
    for params in (
        SamplingParams(),
        SamplingParams(0.8, 40, 0.95, 0.01),
    ):
        ours, truth = (
            sample_from_hidden(
                x.student_hidden.detach(), x.student_weight.detach(), keys, params, impl=impl
            )
            for impl in (size.impl, "reference")
        )
        equal = ours.tokens == truth.tokens
        same = min(same, float(equal.double().mean()))
        worst = max(worst, relative_error(ours.logprob[equal], truth.logprob[equal]))
    return {"same tokens": same, "logprob": worst, "ok": same >= 0.99 and worst <= _STATISTICS}


def _attention(size: Size, dtype: torch.dtype) -> Result:
    """Eight prompts with four samples each, lengths that differ, heads in groups of four."""
    generator = torch.Generator(device=size.device).manual_seed(0)
    prompts, rows, heads, dim, longest, own = 8, 32, (8, 2), 64, 200, 40

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=size.device).to(dtype)

    def lengths(count: int, most: int) -> Tensor:
        return most - torch.arange(count, device=size.device) * 3 % most

    tensors = (
        normal(rows, heads[0], dim),
        *(normal(prompts, heads[1], longest, dim) for _ in range(2)),
        lengths(prompts, longest),
        *(normal(rows, heads[1], own, dim) for _ in range(2)),
        lengths(rows, own),
    )
    ours = shared_prefix_attention(*tensors, impl=size.impl)
    truth = shared_prefix_attention(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors),
        impl="reference",
    )
    error = relative_error(ours, truth)
    return {"out": error, "ok": error <= _GRADIENT[dtype]}
