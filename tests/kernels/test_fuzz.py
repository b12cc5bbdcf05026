"""Random calls of every public op against the references in fp64, and properties of each call.

A number decides a call, and is printed before it: ESR_FUZZ_SEED=number repeats it alone.
ESR_FUZZ_SECONDS (60) or ESR_FUZZ_CASES say how long to go on; with ESR_FUZZ_START the numbers are
the same every time.

An op may err RATIO times as much as plain PyTorch, the reference in fp32, does on the same
operands, or on operands changed in their last bit, or, if that is more, a few units in the last
place of what its result is computed from: the largest logit. Where plain PyTorch knows a gradient
at all, the limit is a third of its norm at most, so that a gradient of zeros, or half of one,
fails; `test_the_criterion_notices_a_wrong_gradient` tries it.

Further: two calls agree bit for bit; operands are left as they were; a NaN stays in its row; rows
of weight 0, and ignored tokens, contribute exactly 0 even if they are NaN. Not here: sharded
vocabularies, which need processes, and torch.compile. On a GPU, calls run there.
"""

from __future__ import annotations

import os
import random
import time
import traceback
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esr_kernels import sample_from_hidden, sample_from_logits, shared_prefix_attention
from tests.kernels import cases, fuzz_cases
from tests.kernels.fuzz_dice import Call
from tests.kernels.fuzz_runs import Results, ours, spec, tensors_of

# `cases.ALLOWED_RATIO` holds for chosen cases; the error of few random numbers is a matter of luck.
RATIO = 2.0
ULPS = 8.0
SAMPLERS = (sample_from_logits, sample_from_hidden)


def _largest_logit(call: Call) -> float:
    """The largest finite logit before and after its transform, a bound of what fp32 rounds."""
    found = [1.0]
    for side in ("", "student_", "teacher_"):
        hidden, weight = (call.arguments.get(f"{side}{name}") for name in ("hidden", "weight"))
        if hidden is None:
            continue
        z = hidden.double() @ weight.double().T
        bias = call.arguments.get(f"{side}bias")
        z = z if bias is None else z + bias.double()
        scale = abs(call.arguments.get(f"{side}logit_scale", 1.0))
        temperature = call.arguments.get("temperature", 1.0)
        if side == "teacher_":
            temperature = call.arguments.get("teacher_temperature", temperature)
        finite = z[z.isfinite()]
        found.append(float(finite.abs().max()) * scale / temperature if finite.numel() else 0.0)
    if "logits" in call.arguments:
        z = call.arguments["logits"]
        found.append(float(z.abs().max()) if z.numel() else 0.0)
    if call.op in SAMPLERS:
        coldest = torch.as_tensor(call.arguments["params"].temperature).double()
        coldest = coldest[coldest > 0]
        found = [max(found) * 2 / min(1.0, float(coldest.min()) if coldest.numel() else 1.0)]
    return max(found)


def _norm(x: Tensor) -> float:
    return float(x.double().norm())


def _summed(call: Call, name: str) -> float:
    """Norm of the gradient `name` if the gradient of each row's logits were its factor at most."""
    arguments, (hidden, weight, _) = call.arguments, call.head
    factor = torch.stack(
        [u.double().abs().expand(len(arguments[hidden])) for u in call.upstream.values()]
    ).sum(0)
    if arguments.get("token_weights") is not None:
        factor = factor * arguments["token_weights"].double().abs()
    if arguments.get("reduction") == "mean":
        factor = factor / max(float(factor.sum()), 1e-30)
    # The logits' own derivative, as of their transform.
    scale = arguments.get(f"{hidden.removesuffix('hidden')}logit_scale", 1.0)
    factor = factor * abs(scale) / arguments.get("temperature", 1.0)
    if name == f"d {hidden}":
        return _norm(factor) * float(arguments[weight].double().norm(dim=1).max())
    return _norm(factor[:, None] * arguments[hidden]) if name == f"d {weight}" else _norm(factor)


def check_numbers(call: Call, result: Results) -> None:
    """The criterion at the head of this file."""
    truth = spec(call, torch.float64)
    on_gpu_path = cases.rounds_dz(call.impl)
    operand = call.arguments["query" if call.op is shared_prefix_attention else call.head[0]]
    dtype = torch.promote_types(operand.dtype, torch.float32)
    if call.op is shared_prefix_attention:
        _check_attention(call, result["out"], truth["out"])
        return
    plain = [spec(call, dtype, on_gpu_path, shaken) for shaken in (None, 1, 2)]
    eps, largest = torch.finfo(dtype).eps, _largest_logit(call)
    # Plain fp64 is the oracle itself, and its shaken variants are few.
    ulps = ULPS if dtype == torch.float32 else 8 * ULPS
    weights = call.arguments.get("token_weights")
    rows = operand.shape[0]
    total = float(rows if weights is None else weights.double().abs().sum())
    if call.arguments.get("reduction") == "mean":
        total = 1.0
    failures = []
    exact_loss_is_finite = all(truth[name].isfinite().all() for name in call.upstream)
    for name, exact in truth.items():
        value = result[name]
        assert value.shape == exact.shape, f"{name}: shape {list(value.shape)}"
        if name == "agreement":
            allowed = max(float((p[name] != exact).sum()) for p in plain)
            wrong = float((value != exact).sum())
            if wrong > RATIO * allowed + 1 + rows / 100:
                failures.append(f"agreement: {wrong} of {rows} differ, plain {allowed}")
            continue
        finite = exact.isfinite()
        if not torch.equal(value[~finite].double(), exact[~finite].double()):
            failures.append(f"{name}: not finite elsewhere than the reference")
            continue
        error = _norm(value[finite] - exact[finite])
        norm = _norm(exact[finite])
        errors = [_norm(p[name][finite] - exact[finite]) for p in plain]
        known = max((e for e in errors if e < float("inf")), default=0.0)
        if name.startswith("d "):
            own = torch.finfo(value.dtype).eps / 2
            known = known if exact_loss_is_finite else float("inf")  # there is no gradient then
            noise = eps * largest * _summed(call, name)
            # 16 bits are rounded twice by a stash: before and after the upstream factor.
            limit = max(RATIO * known, ulps / 2 * eps * largest * norm, 2.2 * own * norm, noise)
            if known < norm / 8 and noise < norm / 8:
                limit = min(limit, norm / 3)
            else:
                limit = max(limit, ulps * noise)
        else:
            scale = total if exact.dim() == 0 else exact.numel() ** 0.5
            limit = max(RATIO * known, ulps * eps * largest * scale)
        if not error <= limit:
            failures.append(
                f"{name}: error {error:.3e}, plain {errors}, norm {norm:.3e}, limit {limit:.3e}"
            )
    assert not failures, "\n".join(failures)


def _logit_deviation(call: Call) -> float:
    """The standard deviation of query times key, scaled, if both are random."""
    query = call.arguments["query"]
    keys = torch.cat([call.arguments[f"{p}_key"].flatten() for p in ("prefix", "suffix")])
    spread = [_norm(x) / max(x.numel(), 1) ** 0.5 for x in (query, keys)]
    scale = call.arguments.get("scale") or query.shape[-1] ** -0.5
    return abs(scale) * query.shape[-1] ** 0.5 * spread[0] * spread[1]


def _check_attention(call: Call, value: Tensor, exact: Tensor) -> None:
    assert value.dtype == call.arguments["query"].dtype
    # A whole bit of 16 would be too much.
    shakes = (None,) if value.dtype.itemsize == 2 else (None, 1, 2)
    plain = [spec(call, value.dtype, shaken=shaken)["out"] for shaken in shakes]
    keys = torch.cat([call.arguments[f"{p}_value"].flatten() for p in ("prefix", "suffix")])
    # A rounding of the values that are averaged, and of the logits, which are four standard
    # deviations at most.
    size = _norm(keys) / max(keys.numel(), 1) ** 0.5 * exact.numel() ** 0.5
    size *= max(1.0, 4 * _logit_deviation(call))
    error, known = _norm(value - exact), max(_norm(p - exact) for p in plain)
    ulps = {2: 1.0, 4: ULPS, 8: 8 * ULPS}[value.dtype.itemsize]  # fp64: plain is the reference
    limit = max(RATIO * known, ulps * torch.finfo(value.dtype).eps * size)
    limit = min(limit, _norm(exact) / 3) if known < _norm(exact) / 8 else limit
    assert error <= limit, f"error {error:.3e}, plain {known:.3e}, limit {limit:.3e}"


def check_draw(call: Call, result: Results) -> None:
    """A draw near an edge may go the other way by rounding: so may a hundredth of the rows."""
    truth = call.op(**{**call.arguments, "impl": "reference"})._asdict()
    rows = truth["tokens"].shape[0]
    same = result["tokens"] == truth["tokens"]
    most = 1 + rows / 100
    assert int((~same).sum()) <= most, f"{int((~same).sum())} of {rows} tokens differ"
    limit = ULPS * torch.finfo(torch.float32).eps * _largest_logit(call)
    for name in ("lse", "logprob", "log_kept"):
        value, exact = result[name].double(), truth[name].double()
        far = ~torch.isclose(value, exact, rtol=0, atol=limit, equal_nan=True)
        wrong = int((far if name == "lse" else far & same).sum())
        # A class at the edge of a nucleus may be kept or not, and moves log_kept.
        assert wrong <= (most if name == "log_kept" else 0), (
            f"{name}: {wrong} of {rows} rows differ, by up to "
            f"{float((value - exact)[far].abs().max()):.3e}, limit {limit:.3e}"
        )


def _same(a: Results, b: Results, rows: Any = slice(None)) -> list[str]:
    """Names of the results that differ in some bit, in some rows."""
    assert a.keys() == b.keys()
    differ = []
    for name in a:
        x, y = (r[name][rows] if r[name].dim() else r[name] for r in (a, b))
        if not (torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())):
            differ.append(name)
    return differ


def _idle_rows(call: Call) -> Tensor | None:
    """Rows [T] that do not count."""
    if call.arguments.get("token_weights") is not None:
        return call.arguments["token_weights"] == 0
    return call.arguments["tokens"] == -100 if "tokens" in call.arguments else None


def _poisoned(x: Tensor, rows: Tensor) -> Tensor:
    """With NaN in some rows, and the same strides and offset: where rows start at 16 bytes, a GPU
    runs another kernel, whose sums may differ in their last bit."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone()
    base = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    base[rows] = torch.nan
    return base


def check_idle_rows(call: Call, result: Results) -> None:
    idle = _idle_rows(call)
    if idle is None or not bool(idle.any()):
        return
    poison = {name: _poisoned(call.arguments[name], idle) for name in call.rows}
    differ = _same(result, ours(call, **poison))
    assert not differ, f"NaN in rows of weight 0 reaches {differ}"
    for name, value in result.items():
        if value.dim() and value.shape[0] == len(idle) and name[2:] not in (call.head[1], "bias"):
            assert not value[idle].any(), f"{name} is not 0 in rows of weight 0"


def check_nan_stays(call: Call, result: Results, row: int) -> None:
    for name in call.rows:
        count = call.arguments[name].shape[0]
        if not count:
            continue
        bad = torch.arange(count) == row % count
        idle = _idle_rows(call)
        if idle is not None and bool(idle[bad]):
            continue
        spoiled = ours(call, **{name: _poisoned(call.arguments[name], bad)})
        of_rows = {
            field
            for field, value in result.items()
            if value.dim() and field[2:] not in call.head[1:] and field != "tokens"
        }
        kept, after = ({f: r[f] for f in of_rows} for r in (result, spoiled))
        differ = _same(kept, after, ~bad)
        assert not differ, f"NaN in row {row % count} of {name} reaches other rows of {differ}"
        if call.op is shared_prefix_attention:  # a row that sees no key gets 0
            arguments = call.arguments | {name: _poisoned(call.arguments[name], bad)}
            expected = spec(replace(call, arguments=arguments), torch.float64)["out"]
            assert torch.equal(spoiled["out"].isnan(), expected.isnan()), "NaN is lost"
        else:
            assert any(spoiled[field][bad].isnan().any() for field in of_rows), "NaN is lost"


def check(call: Call) -> None:
    """Raise AssertionError unless the call is as it must be."""
    before = {name: value.clone() for name, value in tensors_of(call).items()}
    result = ours(call)
    assert not _same(result, ours(call)), "two calls differ"
    (check_draw if call.op in SAMPLERS else check_numbers)(call, result)
    check_idle_rows(call, result)
    check_nan_stays(call, result, 7)
    for name, value in tensors_of(call).items():
        assert torch.equal(value, before[name]), f"{name} was modified"


def _attempt(seed: int) -> tuple[str, str | None]:
    """(the op and impl, what went wrong)."""
    torch.manual_seed(0)
    call = fuzz_cases.draw(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, in the interpreter
            check(call)
    except Exception as error:
        lines = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        return f"{call.op.__name__}, {call.impl}", f"ESR_FUZZ_SEED={seed}\n{call}\n{lines}"
    return f"{call.op.__name__}, {call.impl}", None


@pytest.mark.slow
@pytest.mark.kernels
def test_random_calls():
    given = os.environ.get("ESR_FUZZ_SEED")
    most = 1 if given else int(os.environ.get("ESR_FUZZ_CASES", 10**9))
    end = time.monotonic() + float(os.environ.get("ESR_FUZZ_SECONDS", 60))
    start = os.environ.get("ESR_FUZZ_START")
    seeds = random.SystemRandom() if start is None else random.Random(int(start))
    tally: Counter[str] = Counter()
    failures = []
    while tally.total() < most and (given or time.monotonic() < end):
        seed = int(given) if given else seeds.getrandbits(40)
        print(f"case {tally.total() + 1}: ESR_FUZZ_SEED={seed}", flush=True)
        kind, failure = _attempt(seed)
        tally[kind] += 1
        if failure is not None:
            print(f"FAILED: {failure}", flush=True)
            failures.append(failure)
    print(f"{tally.total()} calls: {dict(sorted(tally.items()))}")
    assert not failures, "\n\n".join([f"{len(failures)} of {tally.total()} calls", *failures[:10]])


@pytest.mark.parametrize("damage", ["zero dX", "halve dX", "zero dW", "halve dW"])
def test_the_criterion_notices_a_wrong_gradient(damage, monkeypatch):
    """Fixed calls, each with a gradient that plain PyTorch knows: all of them must fail."""
    name = f"student_{'hidden' if damage.endswith('dX') else 'weight'}"
    calls = [fuzz_cases.draw(seed) for seed in range(80)]
    calls = [c for c in calls if c.op.__name__ == "linear_divergence" and name in c.trained]
    calls = [c for c in calls if c.impl != "triton" and c.arguments["student_hidden"].numel()]
    noticed = 0
    cases.damage_products(monkeypatch, damage)
    for call in calls:
        truth = spec(call, torch.float64)[f"d {name}"]
        if not truth.isfinite().all() or _norm(truth) <= 1e-3 * _summed(call, f"d {name}"):
            continue
        with pytest.raises(AssertionError, match=f"d {name}"):
            check_numbers(call, ours(call))
        noticed += 1
    assert noticed > 5
