"""How many kernels a call launches on a GPU, counted without one.

    python -m bench.launches

The call runs on tensors without data, as on a GPU: PyTorch works out dtypes and shapes of every
operation and computes nothing, and launches of Triton's kernels are counted instead of made. An
operation that returns a view or uninitialised memory launches nothing; every other one counts as
one launch. A matrix product can take a second launch to sum its splits: the vendor's choice.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from esr_kernels.common import matmul, projection_triton
from esr_kernels.common.transform import LogitTransform
from esr_kernels.divergence.autograd import RecomputeFunction, StashFunction
from esr_kernels.divergence.call import Operands, Request
from esr_kernels.divergence.losses import ReverseKL
from esr_kernels.divergence.plan import Problem
from esr_kernels.divergence.planner import make_plan
from esr_kernels.divergence.statistics import RowSpec

_WITHOUT_LAUNCH = ("empty", "new_empty", "detach", "alias", "_unsafe_view", "set_", "lift_fresh")


class Launches(TorchDispatchMode):
    """Counts of launches by name: `aten.mm`, or the name of a Triton kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        on_gpu = any(
            isinstance(x, torch.Tensor) and x.is_meta
            for x in (result if isinstance(result, (tuple, list)) else (result, *args))
        )
        if on_gpu and not function.is_view and not name.startswith(_WITHOUT_LAUNCH):
            self.counts[f"aten.{name}"] += 1
        return result

    @property
    def total(self) -> int:
        return sum(self.counts.values())


@contextmanager
def counted() -> Iterator[Launches]:
    """Inside, what would be launched on tensors without data is counted and left out."""
    launches = Launches()

    def count(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launches.counts[kernel.fn.__name__.lstrip("_")] += 1

    def interpreted(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: count(kernel)

    with (
        mock.patch.object(JITFunction, "run", count),
        mock.patch.object(InterpretedFunction, "__getitem__", interpreted),
        mock.patch.object(projection_triton, "_INTERPRETS", True),  # there is no GPU to ask for
        mock.patch.object(matmul, "_on_gpu", lambda operand: True),
        mock.patch.object(matmul, "_widens", lambda operand: True),
        mock.patch.object(matmul, "plain_precision", lambda like: nullcontext()),
        launches,
    ):
        yield launches


def divergence_launches(
    problem: Problem, *, labels: bool = False, weighted: bool = False, plan: str = "auto"
) -> Launches:
    """Launches of a forward and backward of reverse KL on checked bf16 operands."""
    p, d = problem, "meta"
    bf16 = {"dtype": torch.bfloat16, "device": d}
    x = Operands(
        torch.empty(p.tokens, p.student_dim, **bf16, requires_grad=p.train_hidden),
        torch.empty(p.classes, p.student_dim, **bf16, requires_grad=p.train_weight),
        None,
        None,
        torch.empty(p.tokens, p.teacher_dim, **bf16),
        torch.empty(p.classes, p.teacher_dim, **bf16),
        None,
        None,
        torch.empty(p.tokens, dtype=torch.int64, device=d) if labels else None,
    )
    spec = RowSpec(ReverseKL(), LogitTransform(), LogitTransform(), 0.1 if labels else 0.0)
    call = Request(spec, p.classes, "sum", plan, None, None, "auto").call(problem)
    function = StashFunction if call.plan.kind == "stash" else RecomputeFunction
    row_weight = torch.empty(p.tokens, device=d) if weighted else None
    with counted() as launches:
        loss, *_ = function.apply(call, None, row_weight, None, *x)
        if problem.needs_gradient:
            loss.backward()
    launches.counts.pop("aten.ones_like", None)  # the 1 that `backward` starts from
    return launches


# The two shapes that docs/gpu.md is about.
SHAPES = (
    Problem(8192, 151_936, 1536, 3584),
    Problem(6400, 151_936, 1536, 2048, train_weight=False),
)


def main() -> None:
    for problem in SHAPES:
        launches = divergence_launches(problem)
        sizes = f"T={problem.tokens}, D={problem.student_dim}, {problem.teacher_dim}"
        print(f"{sizes}, trainable head: {problem.train_weight}; {make_plan(problem)}")
        print(f"{launches.total} launches: {dict(launches.counts.most_common())}\n")


if __name__ == "__main__":
    main()
