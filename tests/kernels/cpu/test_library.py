"""Compiled code beside PyTorch's, whatever the processor; and sharing rows out among threads:
PyTorch's team, a pool where there is none, and after a fork."""

from __future__ import annotations

import ctypes
import multiprocessing
import os

import pytest
import torch

from esr_kernels import SampleKeys, SamplingParams, sample_from_logits
from esr_kernels.attention.op import shared_prefix_attention
from esr_kernels.cpu import library as native
from esr_kernels.cpu import tiles as sampling_native
from esr_kernels.sampling import draw_torch
from tests.kernels.attention.test_op import _case

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


def _operands():
    """Enough keys for three threads."""
    tensors, _ = _case(
        (0,) * 30, prompts=1, length=400, own=100, dim=64, heads=(6, 2), dtype=torch.float32
    )
    return [tensor.cpu() for tensor in tensors]


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_pytorchs_threads_are_found():
    """On Linux, where PyTorch is built with GNU's OpenMP: the fast path is not skipped unseen."""
    if "libgomp" not in open("/proc/self/maps").read():
        pytest.skip("this PyTorch has another OpenMP library")
    assert native._team(os.getpid()) is not None


def test_a_pool_computes_the_same(three_threads, monkeypatch):
    tensors = _operands()
    expected = shared_prefix_attention(*tensors)
    monkeypatch.setattr(native, "_team", lambda process: None)
    assert torch.equal(shared_prefix_attention(*tensors), expected)


def test_a_team_that_is_smaller_than_asked_for_does_all_parts(three_threads, monkeypatch):
    """As OpenMP has it inside of another parallel region."""
    tensors = _operands()
    expected = shared_prefix_attention(*tensors)
    signature = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    )
    asked = []

    @signature
    def alone(part, shared, threads, flags):
        asked.append(threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(part)(shared)

    monkeypatch.setattr(native, "_team", lambda process: alone)
    assert torch.equal(shared_prefix_attention(*tensors), expected)
    assert asked == [3]


def _in_a_child(tensors, sender):
    torch.set_num_threads(3)
    sender.send(shared_prefix_attention(*tensors).numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_threads(three_threads):
    tensors = _operands()
    expected = shared_prefix_attention(*tensors)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_a_child, args=(tensors, sender))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert (receiver.recv() == expected.numpy()).all()
    finally:
        child.kill()
        child.join()


def _without_compiled_tiles(monkeypatch):
    monkeypatch.setattr(sampling_native, "serves", lambda logits: False)


def test_tiles_of_logits(monkeypatch):
    inf, nan = float("inf"), float("nan")
    tiled = 20 * torch.randn(70, 3, 256, generator=torch.Generator().manual_seed(0))
    tiled[0, 0], tiled[0, 1, 1:], tiled[1, 0, 7] = -inf, -inf, -inf
    tiled[2, 0, 9], tiled[2, 1], tiled[3, 0, 0] = nan, nan, inf
    maxima, log_sums = draw_torch.tile_sums(tiled)
    exact = tiled.double()
    top = exact.amax(-1)
    torch.testing.assert_close(maxima, top.float(), rtol=0, atol=0, equal_nan=True)
    below = torch.where(exact == -inf, -inf, exact - top[..., None]).exp().sum(-1).log()
    below[3, 0] = nan
    torch.testing.assert_close(log_sums.double(), below, rtol=0, atol=1e-6, equal_nan=True)
    _without_compiled_tiles(monkeypatch)
    for ours, theirs in zip((maxima, log_sums), draw_torch.tile_sums(tiled), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, top_p=0.9)], ids=str)
def test_draws_without_a_compiler(params, monkeypatch):
    logits = 3 * torch.randn(200, 2048, generator=torch.Generator().manual_seed(0))
    keys = SampleKeys(0, torch.arange(200), 0)
    ours = sample_from_logits(logits, keys, params)
    _without_compiled_tiles(monkeypatch)
    theirs = sample_from_logits(logits, keys, params)
    assert torch.equal(ours.tokens, theirs.tokens)
    for field in ("logprob", "log_kept", "lse"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=0, atol=2e-6)


@pytest.mark.parametrize("processor", ["x86-64", "haswell", "native"])
def test_older_instructions_compute_the_same(processor, monkeypatch, tmp_path):
    """Vectors of 4, 8 and 16 numbers, and turning without vectors."""
    tensors = _operands()
    expected = shared_prefix_attention(*tensors)
    monkeypatch.setenv("ESR_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_TUNING", ([f"-march={processor}"],))
    try:
        library = ctypes.CDLL(str(native._compiled()))
    except OSError:
        pytest.skip("a compiler for another processor")
    monkeypatch.setattr(native, "library", lambda: library)
    out = shared_prefix_attention(*tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    logits = torch.randn(40, 7, 256)
    sums = draw_torch.tile_sums(logits)
    _without_compiled_tiles(monkeypatch)
    for ours, theirs in zip(sums, draw_torch.tile_sums(logits), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
