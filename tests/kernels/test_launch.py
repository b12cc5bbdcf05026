"""Launches of Triton kernels: on the device of their operands, with their options, all of them."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import esr_kernels
from esr_kernels.common import launch

PACKAGE = Path(esr_kernels.__file__).parent


@pytest.fixture(params=[True, False], ids=["of one", "of several"])
def one_gpu(request, monkeypatch):
    monkeypatch.setattr(launch, "_has_one_gpu", lambda: request.param)
    return request.param


@pytest.fixture
def _searches(monkeypatch):
    """Each launch goes through Triton, as in a build of PyTorch without CUDA."""
    monkeypatch.setattr(launch, "_REMEMBERS", False)


def test_a_launch_is_on_the_device_of_its_operand_where_there_are_several(
    monkeypatch, one_gpu, _searches
):
    current = [0]

    class DeviceOf:
        def __init__(self, tensor):
            self.index = tensor.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    seen = []
    kernel = {(4, 2): lambda *args, **kwargs: seen.append((current[0], args, kwargs))}
    launch.launch(kernel, (4, 2), SimpleNamespace(index=1, is_cuda=True))("a", BLOCK=8)
    device = 0 if one_gpu else 1
    assert seen == [(device, ("a",), {"BLOCK": 8, "enable_fp_fusion": True})]
    assert current == [0]


def test_an_operand_on_the_cpu_changes_no_device(_searches):
    """As in Triton's interpreter."""
    ran = []
    launch.launch({(1,): lambda **kwargs: ran.append(1)}, (1,), torch.ones(2))()
    assert ran == [1]


def test_a_descriptor_takes_the_kernel_of_its_dtype_and_block():
    """What Triton compiles for; sizes and strides are arguments of the launch."""

    def variant(rows: int, dtype: torch.dtype, block: list[int]) -> tuple:
        x = torch.empty(rows, 64, dtype=dtype)
        return launch._variant([TensorDescriptor(x, [rows, 64], [64, 1], block)])

    half = variant(8, torch.float16, [16, 32])
    assert half == variant(9, torch.float16, [16, 32])
    assert half != variant(8, torch.bfloat16, [16, 32])
    assert half != variant(8, torch.float16, [32, 32])


def _bare_launches(source: str) -> list[int]:
    """Lines of calls such as kernel[grid](...), whatever the name."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.endswith("kernel")
    ]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*_triton.py")), ids=lambda path: path.stem)
def test_every_launch_goes_through_it(path):
    assert _bare_launches(path.read_text()) == []


def test_a_launch_that_does_not_is_noticed():
    assert _bare_launches("def f(x):\n    _row_kernel[(x.shape[0],)](x, BLOCK=4)\n") == [2]
