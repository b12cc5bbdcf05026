"""Attention in C on shapes that matter to it alone: heads that are not a whole number of vectors,
several blocks of keys, groups of queries, threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from esr_kernels import SampleKeys, cpu, sample_from_logits
from esr_kernels.attention.op import shared_prefix_attention
from tests.kernels.attention.test_op import _assert_close, _case, _in, _truth

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")


def _attend(tensors, **options):
    on_cpu = [tensor.cpu() for tensor in tensors]
    assert cpu.supports_attention(on_cpu[0])
    return shared_prefix_attention(*on_cpu, **options)


@pytest.mark.parametrize(
    ("dim", "window"), [(1, None), (7, 90), (8, None), (40, 90), (64, None), (80, 90), (256, None)]
)
def test_heads_of_any_width(dim, window):
    shape = {"dim": dim, "length": 150, "own": 131, "prompts": 2, "heads": (6, 2)}
    tensors, _ = _case((0, 0, 0, 1, 1, 1), **shape)
    truth = _truth(tensors, window=window).cpu()
    _assert_close(_attend(_in(torch.float32, tensors), window=window), truth, 1e-6)


@pytest.mark.parametrize("repeats", [1, 7, 23, 24, 25, 60])
def test_any_number_of_query_heads_share_a_key_head(repeats):
    tensors, _ = _case((0,) * 9, prompts=1, heads=(repeats, 1))
    truth = _truth(tensors).cpu()
    _assert_close(_attend(_in(torch.float32, tensors)), truth, 1e-6)


def test_wider_heads_go_through_pytorch():
    tensors, groups = _case(dim=257)
    single = _in(torch.float32, tensors)
    assert not cpu.supports_attention(single[0].cpu())
    truth = _truth(tensors, groups)
    out = shared_prefix_attention(*single, groups=groups, impl="torch")
    _assert_close(out, truth, 1e-6)


@pytest.mark.parametrize("window", [None, 40, 90])
def test_a_row_is_the_same_alone_and_with_any_threads(window):
    tensors, groups = _case((0,) * 40, prompts=1, length=200, own=70, dim=64, dtype=torch.float32)
    query, pk, pv, lengths, sk, sv, own = tensors
    together = _attend(tensors, window=window)
    torch.set_num_threads(3)
    assert torch.equal(_attend(tensors, window=window), together)
    for row in (0, 17, 39):
        one = slice(row, row + 1)
        row_of = (query[one], pk, pv, lengths, sk[one], sv[one], own[one])
        alone = _attend(row_of, window=window)
        assert torch.equal(alone[0], together[row])


def test_a_row_is_the_same_where_the_compiler_avoids_chains_of_fused_products(tmp_path):
    """As GCC does by itself for some processors."""
    command = f"{shutil.which('gcc')} --param avoid-fma-max-bits=512"
    if subprocess.run([*command.split(), "-E", "-"], input=b"", capture_output=True).returncode:
        pytest.skip("needs a GCC with this parameter")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "any_threads", __file__],
        env={**os.environ, "CC": command, "ESR_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.glob("native/*.so")), "compiled anew"


@pytest.mark.parametrize("std", [30.0, 1000.0])
def test_large_scores_neither_overflow_nor_vanish(std):
    """The largest score comes late, so that what was summed before shrinks to nothing."""
    tensors, _ = _case((0, 0), prompts=1, length=200, own=5, std=std)
    tensors[1][:] *= torch.linspace(0, 1, 200, dtype=torch.float64)[:, None].to(tensors[1].device)
    tensors = _in(torch.float32, tensors)
    truth = _truth(_in(torch.float64, tensors)).cpu()
    _assert_close(_attend(tensors), truth, 1e-4 if std > 100 else 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    tensors, _ = _case((0, 0, 1, 1), prompts=2, dtype=torch.float32)
    tensors = [tensor.cpu() for tensor in tensors]
    tensors[6][:] = tensors[6].clamp(min=1)
    good = _attend(tensors)
    tensors[5][2, 0, 0, 3] = bad
    out = _attend(tensors)
    heads = tensors[0].shape[1] // 2
    assert not out[2, :heads, 3].isfinite().any()
    assert torch.equal(out[[0, 1]], good[[0, 1]]) and out[3].isfinite().all()
    tensors[0][0, 0] = bad
    assert _attend(tensors)[0, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_not_what_the_compiled_code_writes(dtype):
    tensors, groups = _case(dtype=torch.float32)
    tensors = [tensor.cpu() for tensor in tensors]
    groups = type(groups)(*(field.cpu() for field in groups))
    logits = torch.randn(9, 700)
    keys = SampleKeys(0, torch.arange(9), 0)
    attended, drawn = _attend(tensors, groups=groups), sample_from_logits(logits, keys)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(_attend(tensors, groups=groups), attended)
        again = sample_from_logits(logits, keys)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again, drawn, strict=True))


def test_lazily_negated_operands():
    tensors, groups = _case(dtype=torch.float32)
    tensors = [tensor.cpu() for tensor in tensors]
    groups = type(groups)(*(field.cpu() for field in groups))
    expected = _attend([-tensors[0], *tensors[1:4], -tensors[4], *tensors[5:]], groups=groups)
    lazy = [torch._neg_view(tensors[at]) if at in (0, 4) else tensors[at] for at in range(7)]
    assert torch.equal(_attend(lazy, groups=groups), expected)
