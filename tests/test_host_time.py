"""What the host pays for a launch and a call, with launches stubbed, in a process that compiles."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_TOY = """
import triton
import triton.language as tl

@triton.jit
def toy_kernel(x_ptr, n, scale, pair, y_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, mask=lane < n, other=0.0) * scale
    other, factor = pair
    if other is not None:
        x += tl.load(other + lane, mask=lane < n, other=0.0) * factor
    tl.store(y_ptr + lane, x, mask=lane < n)
"""

# Every launch of a kernel from memory must be the one that Triton finds itself, and have its
# arguments in the kernel's order.
_SAME_KERNEL = """
import itertools, random, sys
sys.path.insert(0, sys.argv[1])
from bench import host_time
import torch
from triton.compiler.compiler import CompiledKernel
from toy_triton import toy_kernel
from esr_kernels.common import launch

floats = torch.zeros(64)
tensors = [floats, floats[1:], floats.bfloat16()]
pairs = [(None, 1.0), (floats[1:], 2.0)]
calls = list(itertools.product(tensors, [1, 2, 16], pairs))
random.Random(0).shuffle(calls)
used = []
find = CompiledKernel.__getitem__
with host_time.stubbed_launches():
    def launcher(self, grid):
        run = find(self, grid)
        return lambda *args: used.append((self, args)) or run(*args)

    CompiledKernel.__getitem__ = launcher
    for again in range(2):
        for x, n, pair in calls:
            launch.launch(toy_kernel, (1,), floats)(
                x, n, BLOCK=32, y_ptr=floats, pair=pair, scale=3.0)
            wanted = toy_kernel.warmup(
                x, n, 3.0, pair, y_ptr=floats, BLOCK=32, grid=(1,), enable_fp_fusion=True)
            if again:
                kernel, args = used[-1]
                assert kernel is wanted, (x.dtype, n, pair)
                assert args[0] is x and args[3] is pair and args[4] is floats, args
                assert (args[1], args[2], *args[5:]) == (n, 3.0, 32), args
assert len(used) >= len(calls) and len({id(kernel) for kernel, _ in used}) > 9, len(used)
print(len(used), "launches from memory")
"""

_RATIOS = """
from bench import host_time
for name, (ours, plain) in host_time.ratios().items():
    print(name, ours / plain)
"""


def _run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="launches are stubbed")
def test_a_launch_from_memory_is_the_one_that_triton_finds(tmp_path):
    (tmp_path / "toy_triton.py").write_text(_TOY)
    assert "launches from memory" in _run(_SAME_KERNEL, str(tmp_path))


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="launches are stubbed")
def test_host_time_of_a_call():
    """Far from the limits of `bench.host_time`, which a busy machine cannot keep."""
    ratios = [float(line.split()[-1]) for line in _run(_RATIOS).splitlines()]
    assert len(ratios) == 2 and max(ratios) < 5
