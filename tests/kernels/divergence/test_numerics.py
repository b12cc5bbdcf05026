"""linear_divergence against the fp64 oracle: no worse than plain PyTorch, however it runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, product

import pytest
import torch

from esr_kernels import (
    JSD,
    Divergence,
    Jeffreys,
    KLMix,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    plan_linear_divergence,
)
from esr_kernels.divergence.losses import kernel_form, resolve_divergence
from esr_kernels.divergence.plan import Problem
from esr_kernels.divergence.planner import make_plan
from tests.kernels import cases

DIVERGENCES = [
    "forward_kl",
    "reverse_kl",
    KLMix(0.25, 0.75),
    Jeffreys(),
    JSD(0.3),
    SkewForwardKL(0.2),
    SkewReverseKL(0.2),
    TotalVariation(),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _has_kernel(divergence: Divergence | str) -> bool:
    return kernel_form(resolve_divergence(divergence)) is not None


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


PLANS = ["stash", "recompute"]
# fp16 differs from bf16 in range only: one divergence of each kind shows it.
COMBINATIONS = [
    (case_name, divergence, dtype, plan)
    for case_name, divergence, dtype, plan in product(cases.CASES, DIVERGENCES, DTYPES, PLANS)
    if dtype != torch.float16 or divergence in ("reverse_kl", JSD(0.3))
]


# 16-bit on CPU: one case for each dtype and divergence, all cases and both plans among them.
ON_CPU = [combination for combination in COMBINATIONS if combination[2] == torch.float32]
ON_CPU += [
    (case_name, divergence, dtype, plan)
    for (dtype, divergence), case_name, plan in zip(
        product(DTYPES[1:], DIVERGENCES), cycle(cases.CASES), cycle(PLANS), strict=False
    )
]


# On CPU, "auto" is the compiled row passes where there is a C compiler.
@pytest.mark.parametrize(
    ("case_name", "divergence", "dtype", "plan", "impl"),
    [
        *((*combination, impl) for combination in ON_CPU for impl in ("auto", "torch")),
        *(
            (*combination, "triton")
            for combination in cases.thinned(COMBINATIONS, 13, 5)
            if _has_kernel(combination[1])
        ),
    ],
    ids=_name,
)
def test_no_worse_than_plain_pytorch(case_name, divergence, dtype, plan, impl):
    result = cases.ours(cases.CASES[case_name](dtype), divergence, plan=plan, impl=impl)
    yardsticks = cases.yardsticks(case_name, divergence, dtype, cases.rounds_dz(impl))
    cases.assert_as_good_as_plain(result, *yardsticks)


@dataclass(frozen=True)
class _HalfSquare(Divergence):
    """sum (p - q)^2 / 2: not one of the package's."""

    def summand(self, p, q, log_ratio):
        return 0.5 * (p - q) ** 2

    def pull(self, p, q, log_ratio):
        return p * (p - q)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case_name", ["random_pair", "minus_infinity"])
def test_a_divergence_needs_two_functions_only(case_name, plan):
    divergence = _HalfSquare()
    result = cases.ours(cases.CASES[case_name](torch.float32), divergence, plan=plan, impl="auto")
    yardsticks = cases.yardsticks(case_name, divergence, torch.float32, rounds_dz=False)
    cases.assert_as_good_as_plain(result, *yardsticks)


def test_a_divergence_without_a_kernel_runs_in_pytorch_on_a_gpu():
    sizes = 64, 1000, 32, 32
    assert plan_linear_divergence(*sizes, _HalfSquare(), device="cuda").problem.rows == "torch"
    assert plan_linear_divergence(*sizes, JSD(0.3), device="cuda").problem.rows == "triton"


@pytest.mark.kernels
def test_a_row_split_over_programs():
    """5,003 classes are ten blocks, with a program for each where there is one token.

    Eight draws of a token are compared as one: the error of a single number is a matter of luck.
    """
    draws = [cases._pair(1, 5003, (8, 8), (2.0, 2.0), torch.float32, seed=n) for n in range(8)]
    ours = [cases.ours(case, "reverse_kl", plan="stash", impl="triton") for case in draws]
    plain = [cases.plain(case, "reverse_kl") for case in draws]
    oracle = [cases.oracle(case, "reverse_kl") for case in draws]
    cases.assert_as_good_as_plain(*map(_as_one, (ours, plain, oracle)))


def _as_one(draws: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@pytest.mark.parametrize(
    ("divergence", "plan", "impl"),
    [
        *product(DIVERGENCES, PLANS, ["auto", "torch"]),
        *(
            (*both, "triton")
            for both in cases.thinned(list(product(DIVERGENCES, PLANS)), 5, 5)
            if _has_kernel(both[0])
        ),
    ],
    ids=_name,
)
def test_identical_models_have_no_divergence_and_no_gradient(divergence, plan, impl):
    """But for rounding: 1e-6 of the gradient of a random pair, or what plain PyTorch leaves."""
    case = cases.identical(torch.float32)
    baseline = cases.plain(case, divergence)
    result = cases.ours(case, divergence, plan=plan, impl=impl)
    scale = cases.plain(cases.random_pair(torch.float32), divergence)
    assert result["per_token"].abs().max() <= 4e-6
    assert result["agreement"].eq(1).all()
    for name in ("d student_hidden", "d student_weight"):
        assert result[name].norm() <= max(1e-6 * scale[name].norm(), baseline[name].norm())


# On CPU ten of them are blocks of rows, for PyTorch's passes over them.
FEW_MEBIBYTES = 14 if cases.DEVICE == "cpu" else 3


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("chunks", "mebibytes"), [("one", 24), ("many", FEW_MEBIBYTES)])
def test_chunking_does_not_change_the_result(plan, chunks, mebibytes):
    """Many tokens, a budget that forces several chunks, and still no worse than plain PyTorch."""
    case = cases._pair(300, 2501, (24, 40), (2.0, 2.0), torch.float32)
    fp32 = torch.float32
    problem = Problem(300, 2501, 24, 40, fp32, fp32, cases.DEVICE, rows="torch")
    made = make_plan(problem, plan, mebibytes << 20)
    assert (made.token_chunk < 300 or made.vocab_chunk < 2501) == (chunks == "many")
    truth, baseline = cases.oracle(case, "reverse_kl"), cases.plain(case, "reverse_kl")
    result = cases.ours(case, "reverse_kl", plan=made, impl="torch")
    cases.assert_as_good_as_plain(result, baseline, truth)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("damage", cases.DAMAGES)
def test_the_suite_notices_a_wrong_gradient(damage, plan, monkeypatch):
    """A mutation check: the criterion above must fail when the op is broken on purpose."""
    cases.damage_products(monkeypatch, damage)
    for dtype in (torch.float32, torch.bfloat16):
        for make in (cases.random_pair, cases.nearly_equal):
            case = make(dtype)
            truth, baseline = cases.oracle(case, "reverse_kl"), cases.plain(case, "reverse_kl")
            result = cases.ours(case, "reverse_kl", impl="torch", plan=plan)
            with pytest.raises(AssertionError, match="d student"):
                cases.assert_as_good_as_plain(result, baseline, truth)
