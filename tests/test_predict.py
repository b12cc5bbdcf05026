"""The predictor's parts: what a call launches, what a kernel consists of, what a cache misses."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.ahead_of_time import Launched, _tensors
from bench.gpus import GPUS
from bench.kernel_time import Sizes, _moved
from bench.l2_model import steady_traffic
from bench.machine_code import is_async_copy, is_product, read_amd, read_sass
from bench.products import product_seconds
from bench.walk import Elementwise, Product, empty, walk

# An outer loop around two inner ones, the second of which ends in a jump out of line and back, as
# waits for a barrier do on Blackwell.
_SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/                   FADD R1, R1, R2 ;
        /*0090*/                   FADD R1, R1, R2 ;
        /*00a0*/              @!P0 BRA 0x20 ;
        /*00b0*/                   MUFU.EX2 R3, R3 ;
        /*00c0*/               @P1 BRA 0x100 ;
        /*00d0*/                   FADD R1, R1, R2 ;
        /*00e0*/               @P2 BRA 0x10 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   NOP ;
        /*0110*/                   BRA 0xd0 ;
"""
_AMD = """
\ts_mov_b32 s0, 0
.LBB0_1:
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tv_add_f32 v0, v0, v1
\tv_add_f32 v0, v0, v1
\tv_add_f32 v0, v0, v1
\tv_add_f32 v0, v0, v1
\tv_add_f32 v0, v0, v1
\tv_add_f32 v0, v0, v1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_loops_of_machine_code_are_found_with_their_instructions():
    code = read_sass(_SASS)
    outer, inner = code.loops
    assert (min(outer.body), len(outer.body), outer.inner) == (1, 16, False)
    assert (min(inner.body), len(inner.body), inner.inner) == (2, 9, True)
    assert code.count(is_product, inner.body) == code.count(is_async_copy, inner.body) == 1
    [loop] = read_amd(_AMD).loops
    assert len(loop.body) == 9 and read_amd(_AMD).count(is_product, loop.body) == 1


def test_a_walk_counts_products_and_the_rest_with_their_bytes():
    def call():
        x, w = empty(8, 32), empty(100, 32)
        return (x @ w.T).float().mul_(2.0)[:, :50].T

    product, cast, scaled = walk("sm_90", call)
    assert product == Product(8, 100, 32, torch.bfloat16, torch.bfloat16, False)
    assert cast == Elementwise("_to_copy", 8 * 100 * (2 + 4))
    assert scaled == Elementwise("mul_", 8 * 100 * (4 + 4))


def test_the_bytes_of_a_launch_are_those_of_its_tensors_described_ones_too():
    x = torch.empty(16, 64, dtype=torch.bfloat16)
    described = TensorDescriptor(x, [16, 64], [64, 1], [16, 32])
    found = list(_tensors([described, (x, None, 3), 1.5]))
    assert len(found) == 2 and all(tensor is x for tensor in found)


def test_the_gradient_of_a_loss_is_not_passed_for_a_factor_of_one():
    def moved(name: str, total: dict) -> float:
        function = SimpleNamespace(fn=SimpleNamespace(__name__=name), arg_names=["total_ptr"])
        kernel = SimpleNamespace(src=SimpleNamespace(constants=total))
        return _moved(Launched(function, kernel, 1, 4096), Sizes(8, 100, (32,)))

    assert moved("_scale_kernel", {(0,): None}) == 0
    assert moved("_scale_kernel", {}) == 4096, "it adds to a tensor"
    assert moved("_gradient_kernel", {}) == 4096


def test_what_does_not_fit_the_cache_is_loaded_again_each_time():
    """Ten programs, each walking its own unit of 10 bytes and one of 5 that all share."""
    programs = [[[(program, 10), ("shared", 5)]] * 6 for program in range(10)]
    assert steady_traffic(programs, 200.0).missed == 0
    assert steady_traffic(programs, 50.0).missed == 3 * 10 * 10, "the shared unit stays"
    assert steady_traffic(programs, 200.0).asked == 3 * 10 * 15


def test_without_the_vendors_model_a_product_takes_the_stated_rate():
    gpu = GPUS["H100"]
    product = Product(4096, 4096, 4096, torch.bfloat16, torch.bfloat16, False)
    seconds = product_seconds(product, gpu, "stated rate")
    assert seconds == product.flops / gpu.product_rate
    narrow = Product(1, 4096, 4096, torch.bfloat16, torch.bfloat16, False)
    assert product_seconds(narrow, gpu, "stated rate") > 4096 * 4096 * 2 / gpu.hbm


def test_the_model_is_near_what_others_measured(monkeypatch):
    from bench import published

    # As on a machine without NVIDIA's library, which knows narrow products better.
    stated = lambda product, gpu: product_seconds(product, gpu, "stated rate")  # noqa: E731
    monkeypatch.setattr(published, "product_seconds", stated)
    for what, _, measured, seconds in published.comparisons():
        least = 0.6 if what.startswith("Liger linear JSD") else 0.8
        assert least < seconds * 1e3 / measured < 1.2, what
