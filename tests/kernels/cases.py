"""Pairs of student and teacher that make a divergence hard, and the errors of an implementation.

The oracle is the reference in fp64 on the same (already rounded) operands. The yardstick is plain
PyTorch with fp32 logits and autograd: an implementation may err at most 1.5 times as much. No
absolute tolerance appears, so a gradient of zeros, or half of one, fails. For 16-bit operands there
are two: on CPU only the final gradient is rounded; on a GPU the gradient of the logits too, before
the two products of the backward, in ours as in `torch.mm(..., out_dtype=)`.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import conftest
from esr_kernels import linear_divergence
from esr_kernels.common import matmul
from esr_kernels.divergence import reference as oracle_module
from tests.kernels.yardstick_logits import RoundGradient as RoundGradient
from tests.kernels.yardstick_logits import behind_identity, behind_rounding, multiplies_in_16_bits
from tests.kernels.yardstick_logits import fp32_logits as fp32_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALLOWED_RATIO = 1.5
TOKENS = 23
# Where plain PyTorch is right to the last bits: of a logged statistic. A GPU's exp errs by two.
STATISTICS_ULPS = 8.0 if conftest.HAS_GPU or conftest.GPU_EXP else 4.0

# ESR_EVERY_CASE=1 leaves out no test of a kernel, wherever it runs; takes minutes.
_EVERY_CASE = os.environ.get("ESR_EVERY_CASE") == "1"
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_SANITIZES = os.environ.get("ESR_TRITON_ON_CPU") == "1"

_Combination = TypeVar("_Combination")


def thinned(
    combinations: list[_Combination], interpreted: int, sanitized: int = 1
) -> list[_Combination]:
    """All combinations on a GPU, one in `interpreted` in Triton's interpreter and one in
    `sanitized` in the sanitizer (`make sanitize`), both of which take up to a second for each.

    The steps have no factor in common with the sizes of the axes, so that the combinations left
    have every value of each axis about equally often.
    """
    step = interpreted if _INTERPRETS else sanitized if _SANITIZES else 1
    return combinations[:: 1 if _EVERY_CASE else step]


@dataclass
class Case:
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    def rows(self, at: Any) -> Case:
        """The same heads and some of the tokens."""
        return replace(
            self, student_hidden=self.student_hidden[at], teacher_hidden=self.teacher_hidden[at]
        )

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(x.to(dtype) for x in self.tensors), self.options, self.upstream)


def _pair(
    tokens: int,
    classes: int,
    dims: tuple[int, int],
    std: tuple[float, float],
    dtype: torch.dtype,
    extra_classes: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> Case:
    """Logits of standard deviation `std`, from hidden states of variance 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = [normal(tokens, dim) for dim in dims]
    weight = [
        normal(classes + extra, dim) * (s / dim**0.5)
        for extra, dim, s in zip(extra_classes, dims, std, strict=True)
    ]
    tensors = (hidden[0], weight[0], hidden[1], weight[1])
    return Case(*(tensor.to(dtype).to(DEVICE) for tensor in tensors))


def random_pair(dtype: torch.dtype) -> Case:
    return _pair(TOKENS, 1003, (24, 40), (1.0, 1.5), dtype)


def peaked(dtype: torch.dtype) -> Case:
    return _pair(TOKENS, 1003, (24, 40), (10.0, 30.0), dtype)


def nearly_equal(dtype: torch.dtype) -> Case:
    case = _pair(TOKENS, 1003, (24, 24), (3.0, 3.0), torch.float32)
    hidden, weight = case.student_hidden, case.student_weight
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7))
    return Case(hidden, weight, hidden + 0.02 * noise.to(DEVICE), weight).to(dtype)


def identical(dtype: torch.dtype) -> Case:
    case = _pair(TOKENS, 1003, (24, 24), (3.0, 3.0), dtype)
    return replace(
        case, teacher_hidden=case.student_hidden.clone(), teacher_weight=case.student_weight.clone()
    )


def minus_infinity(dtype: torch.dtype) -> Case:
    """Some classes removed from both models by a bias of -inf, some from one only."""
    case = _pair(TOKENS, 1003, (24, 40), (2.0, 2.0), dtype)
    bias = torch.zeros(1003, dtype=dtype, device=DEVICE)
    bias[5:40] = -torch.inf
    bias[-1] = -torch.inf
    case.options = {"student_bias": bias, "teacher_bias": bias.clone()}
    return case


def unequal_vocabularies(dtype: torch.dtype) -> Case:
    return _pair(TOKENS, 1003, (24, 40), (2.0, 2.0), dtype, extra_classes=(0, 29))


def one_token(dtype: torch.dtype) -> Case:
    return _pair(1, 1003, (24, 40), (2.0, 2.0), dtype)


TRANSFORMS = {
    "temperature": 0.7,
    "teacher_temperature": 1.3,
    "student_softcap": 5.0,
    "teacher_softcap": 7.0,
    "student_logit_scale": 1.7,
    "teacher_logit_scale": 0.6,
    "num_classes": 998,
    "reduction": "mean",
}


def odd_options(dtype: torch.dtype) -> Case:
    """Every transform of the logits at once, weights with zeros, an upstream gradient of 1/4."""
    case = _pair(TOKENS, 1003, (24, 40), (4.0, 4.0), dtype, extra_classes=(3, 0))
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(TOKENS, generator=generator)
    weights[::5] = 0
    case.options = {
        "token_weights": weights,
        "student_bias": torch.randn(1006, generator=generator).to(dtype).to(DEVICE),
        **TRANSFORMS,
    }
    case.upstream = 0.25
    return case


def labelled(dtype: torch.dtype) -> Case:
    """A cross-entropy mixed in, some rows without a label, some sure of theirs (p near 1)."""
    case = _pair(TOKENS, 1003, (24, 40), (6.0, 2.0), dtype)
    logits = case.student_hidden.float() @ case.student_weight.float().T
    labels = torch.randint(1003, (TOKENS,), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    labels[::3] = logits.argmax(1)[::3]
    labels[::7] = -100
    case.options = {"labels": labels, "label_weight": 0.4, "student_softcap": 40.0}
    return case


def mapped_vocabularies(dtype: torch.dtype) -> Case:
    """The models share 977 classes, numbered differently, and have others besides."""
    case = _pair(TOKENS, 1003, (24, 40), (2.0, 2.0), dtype, extra_classes=(11, 40))
    generator = torch.Generator().manual_seed(9)
    case.options = {
        "student_ids": torch.randperm(1014, generator=generator)[:977].to(DEVICE),
        "teacher_ids": torch.randperm(1043, generator=generator)[:977].to(DEVICE),
        "student_bias": torch.randn(1014, generator=generator).to(dtype).to(DEVICE),
    }
    return case


def merged_classes(dtype: torch.dtype) -> Case:
    """Three shared classes as one, one more of the student's and two of the teacher's; labels."""
    case = _pair(TOKENS, 1003, (24, 40), (3.0, 2.0), dtype, extra_classes=(9, 30))
    generator = torch.Generator().manual_seed(11)
    # Half of the tokens are near an end, which both models give much of their probability.
    case.student_hidden[::2] += 2 * case.student_weight[700]
    case.teacher_hidden[::2] += 2 * case.teacher_weight[1021]
    labels = torch.randint(1003, (TOKENS,), generator=generator)
    labels[::4], labels[::7] = 700, -100
    case.options = {
        "merge_student_ids": (700, 3, 1002, 1009),
        "merge_teacher_ids": (3, 1021, 700, 1002, 1030),
        "num_classes": 1003,
        "labels": labels.to(DEVICE),
        "label_weight": 0.3,
        "token_weights": torch.rand(TOKENS, generator=generator),
    }
    return case


def merged_and_mapped(dtype: torch.dtype) -> Case:
    """Merged classes of vocabularies that number them differently, under every transform."""
    case = mapped_vocabularies(dtype)
    student, teacher = case.options["student_ids"], case.options["teacher_ids"]
    shared = [5, 400, 976]
    unmapped = [
        sorted(set(range(rows)) - set(ids.tolist()))[:2]
        for rows, ids in ((1014, student), (1043, teacher))
    ]
    case.options["student_bias"][student[400]] = -torch.inf
    case.options |= {
        "merge_student_ids": [*student[shared].tolist(), *unmapped[0]],
        "merge_teacher_ids": [*unmapped[1], *teacher[shared].tolist()],
        "temperature": 0.7,
        "student_softcap": 5.0,
        "teacher_softcap": 7.0,
        "student_logit_scale": -1.7,
        "reduction": "mean",
    }
    case.upstream = 0.25
    return case


CASES = {
    make.__name__: make
    for make in (
        random_pair,
        peaked,
        nearly_equal,
        minus_infinity,
        unequal_vocabularies,
        one_token,
        odd_options,
        labelled,
        mapped_vocabularies,
        merged_classes,
        merged_and_mapped,
    )
}


def _results(case: Case, leaves: dict[str, Tensor], output: Any) -> dict[str, Tensor]:
    (output["loss"].sum() * case.upstream).backward()
    gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    return {**{k: v.detach() for k, v in output.items()}, **gradients}


def _leaves(case: Case, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    convert = (lambda x: x.detach().clone()) if dtype is None else (lambda x: x.detach().to(dtype))
    leaves = {
        "student_hidden": convert(case.student_hidden).requires_grad_(),
        "student_weight": convert(case.student_weight).requires_grad_(),
    }
    options = dict(case.options)
    if "student_bias" in options:
        leaves["student_bias"] = convert(options["student_bias"]).requires_grad_()
        options["student_bias"] = leaves["student_bias"]
    if "token_weights" in options:
        options["token_weights"] = options["token_weights"].to(DEVICE)
    return leaves, options


def oracle(case: Case, divergence: Any) -> dict[str, Tensor]:
    leaves, options = _leaves(case, torch.float64)
    student = leaves["student_hidden"], leaves["student_weight"]
    output = oracle_module.linear_divergence(*student, *case.tensors[2:], divergence, **options)
    return _results(case, leaves, output)


def rounds_dz(impl: str) -> bool:
    """Whether an implementation multiplies 16-bit gradients of the logits, as all on a GPU do."""
    return impl == "triton" or DEVICE == "cuda"


def plain(case: Case, divergence: Any, rounds_dz: bool = False) -> dict[str, Tensor]:
    """Plain PyTorch: fp32 logits, autograd, gradients rounded to the operands' dtype once.

    `rounds_dz`: the products of the backward run on 16-bit operands, as a GPU has them.
    """
    leaves, options = _leaves(case, None)
    hidden, weight = leaves["student_hidden"], leaves["student_weight"]
    if rounds_dz and hidden.dtype.itemsize < 4:
        hidden, weight, bias = behind_rounding(hidden, weight, options.get("student_bias"))
        options["student_bias"] = bias
    elif multiplies_in_16_bits(hidden, weight):
        hidden, weight = behind_identity(hidden, weight)
    teacher = case.tensors[2:]
    if multiplies_in_16_bits(*teacher):
        teacher = behind_identity(*teacher)
    output = oracle_module.linear_divergence(
        hidden, weight, *teacher, divergence, dtype=torch.float32, **options
    )
    return _results(case, leaves, output)


def ours(case: Case, divergence: Any, **how: Any) -> dict[str, Tensor]:
    leaves, options = _leaves(case, None)
    options["token_weights"] = case.options.get("token_weights")
    student = leaves["student_hidden"], leaves["student_weight"]
    output = linear_divergence(*student, *case.tensors[2:], divergence, **{**options, **how})
    return _results(case, leaves, output._asdict())


DAMAGES = ["zero dX", "halve dX", "zero dW", "halve dW", "bf16 logits"]


def damage_products(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """One of `DAMAGES` in the products of every op, for a check that the criterion notices it."""
    if damage == "bf16 logits":
        project = matmul.project

        def rounded(hidden: Tensor, weight: Tensor, out: Tensor, *ids: Any) -> Tensor:
            return out.copy_(project(hidden, weight, out, *ids).to(torch.bfloat16))

        monkeypatch.setattr(matmul, "project", rounded)
        return
    name = {"dX": "hidden_gradient", "dW": "weight_gradient"}[damage[-2:]]
    compute, factor = getattr(matmul, name), 0.0 if damage.startswith("zero") else 0.5

    def scaled(*args: Any, alpha: Any, **how: Any) -> None:
        compute(*args, alpha=alpha * factor, **how)

    monkeypatch.setattr(matmul, name, scaled)


@functools.lru_cache(maxsize=4)
def yardsticks(
    case_name: str, divergence: Any, dtype: torch.dtype, rounds_dz: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(`plain`, `oracle`) of a case of `CASES`; neighbouring tests ask for the same."""
    case = CASES[case_name](dtype)
    return plain(case, divergence, rounds_dz), oracle(case, divergence)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in L2, and inf where the two disagree about finiteness."""
    value, truth = value.double().flatten(), truth.double().flatten()
    norm = truth.norm()
    difference = (value - truth).norm()
    if not torch.isfinite(difference):
        return float("inf")
    return float(difference / norm) if norm > 0 else float(difference)


def assert_as_good_as_plain(
    result: dict[str, Tensor], baseline: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Gradients against the yardstick; prints both errors so that a run shows the margin."""
    failures = []
    for name, exact in truth.items():
        error = relative_error(result[name], exact)
        allowed = relative_error(baseline[name], exact)
        # Against a yardstick of NaN anything would do.
        assert allowed < float("inf"), f"{name}: the oracle or plain PyTorch is not finite"
        print(f"{name:>16}: ours {error:.2e}  plain {allowed:.2e}")
        limit = ALLOWED_RATIO * allowed
        if name == "loss":
            # One number may be right by luck; the rows it sums up say how well it is known.
            limit = ALLOWED_RATIO * max(
                allowed, relative_error(baseline["per_token"], truth["per_token"])
            )
        if not name.startswith("d "):
            limit = max(limit, STATISTICS_ULPS * torch.finfo(torch.float32).eps)
        if not error <= limit:
            failures.append(f"{name}: error {error:.3e}, plain PyTorch {allowed:.3e}")
    assert not failures, "; ".join(failures)
