"""What the host pays for a call on the GPU's path, beside plain PyTorch, with no GPU.

    python -m bench.host_time

Operands are tiny and lie on the CPU, Triton's kernels are compiled for sm_90 and their launches
return at once: what is left is Python, PyTorch's dispatch and what finds the compiled kernel. Calls
are repeated, as in training, so that the checks of their arguments are those of a call whose like
has been seen. Medians of the thread's own time in runs that take turns. The operations of either
side compute on a few numbers; on a GPU each would be a launch, of which a call here has fewer.
"""

from __future__ import annotations

import os

os.environ["ESR_TRITON_ON_CPU"] = "1"  # read when the package is imported

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from bench import measure
from bench.host_calls import CALLS, CLASSES, DIM, ROUNDS, TOKENS, divergence, microseconds
from esr_kernels.common import launch, matmul, workspace

BARE = "divergence, bare: the same products, buffers and outputs"


def _new(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`workspace.borrow` on a GPU."""
    return torch.empty(*shape, dtype=dtype, device=device)


class _Driver:
    """As much of a Triton driver as compiling takes and looking a kernel up."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """Inside, Triton compiles kernels, and launching one does nothing."""
    driver.set_active(_Driver())

    def run(*args: object) -> None: ...

    with (
        mock.patch.object(CompiledKernel, "run", run),
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),
        mock.patch.object(CompiledKernel, "launch_metadata", lambda *args: None),
        # Without what products and buffers take for a CPU's sake.
        mock.patch.object(matmul.cpu, "project_transposed", lambda *args: False),
        mock.patch.object(workspace, "borrow", _new),
        mock.patch.object(launch, "_REMEMBERS", True),
    ):
        yield


class _Bare(torch.autograd.Function):
    """What a stash cannot do without: its buffers, four products, outputs and gradients."""

    @staticmethod
    def forward(ctx, x, w, teacher, head):  # type: ignore[no-untyped-def]
        s, t = torch.empty(TOKENS, CLASSES), torch.empty(TOKENS, CLASSES)
        torch.mm(x, w.T, out=s)
        torch.mm(teacher, head.T, out=t)
        rows = torch.empty(12, TOKENS).unbind()
        gradients = torch.empty_like(x), torch.empty_like(w)
        torch.mm(s, w, out=gradients[0])
        torch.mm(s.T, x, out=gradients[1])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*rows[:7])
        return rows[7].sum(), *rows[:7]

    @staticmethod
    def backward(ctx, upstream, *_):  # type: ignore[no-untyped-def]
        return *ctx.saved_tensors, None, None


def _floor() -> tuple[Callable[[], object], Callable[[], object]]:
    """(an autograd function that launches no kernel and checks nothing, plain PyTorch)."""
    x, w = (torch.randn(n, DIM, requires_grad=True) for n in (TOKENS, CLASSES))
    teacher, head = (torch.randn(n, DIM) for n in (TOKENS, CLASSES))

    def bare() -> None:
        x.grad = w.grad = None
        _Bare.apply(x, w, teacher, head)[0].backward()

    return bare, divergence("triton", "cpu")[1]


LIMITS = {"linear_divergence, forward and backward": 1.5, "sample_from_hidden": 3.0}


def ratios() -> dict[str, tuple[float, float]]:
    """(ours, plain PyTorch) in microseconds of host time."""
    torch.set_num_threads(1)
    with stubbed_launches():
        return {name: microseconds(make("triton", "cpu")) for name, make in CALLS.items()}


def main() -> None:
    table = {}
    for name, (ours, plain) in ratios().items():
        table[name] = {"us": ours, "plain_us": plain, "ratio": ours / plain, "aim": LIMITS[name]}
    bare, plain = microseconds(_floor())
    table[BARE] = {"us": bare, "plain_us": plain, "ratio": bare / plain, "aim": None}
    for name, row in table.items():
        aim = f" (wanted: at most {row['aim']})" if row["aim"] else ""
        times = f"{row['us']:7.0f} us, plain PyTorch {row['plain_us']:7.0f} us"
        print(f"{name:<62} {times}: {row['ratio']:.2f} times{aim}")
    measure.record("host_time_cpu", "a small call, launches stubbed", ROUNDS, table)


if __name__ == "__main__":
    main()
