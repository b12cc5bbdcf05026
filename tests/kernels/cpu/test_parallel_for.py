"""Rows on several threads: PyTorch's own, a pool in their absence, and after a fork."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from esr_kernels import cpu
from esr_kernels.attention.op import shared_prefix_attention
from esr_kernels.cpu import library, parallel_for
from tests.kernels.attention.test_op import _case

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="needs a C compiler")


def _operands():
    """Enough keys for three threads."""
    tensors, _ = _case(
        (0,) * 30, prompts=1, length=400, own=100, dim=64, heads=(6, 2), dtype=torch.float32
    )
    torch.set_num_threads(3)
    return [tensor.cpu() for tensor in tensors]


def test_pytorchs_threads_are_found():
    """Where PyTorch has GNU's OpenMP: the fast path must not be skipped unnoticed."""
    if "libgomp" not in open("/proc/self/maps").read():
        pytest.skip("this PyTorch has another OpenMP library")
    assert parallel_for._pytorch_gomp_parallel(os.getpid()) is not None


_FOREIGN_LIBRARY = """
static int calls;
int foreign_calls(void) { return calls; }
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags) {
    (void)threads, (void)flags;
    calls++;
    body(data);
}
"""
_IN_A_PROCESS = """
import ctypes, os, sys
foreign = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import torch
from esr_kernels.cpu import RowPass, parallel_for, supports_tiles, tile_logsumexp
assert ctypes.CDLL(None).GOMP_parallel  # what a search of the whole process finds
assert parallel_for._pytorch_gomp_parallel(os.getpid()) is None
torch.set_num_threads(3)
tiles = torch.randn(2000, 256)
assert supports_tiles(tiles)
calls = foreign.foreign_calls()
maxima, _ = tile_logsumexp(tiles)
assert foreign.foreign_calls() == calls
assert torch.equal(maxima, tiles.amax(-1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the symbol lookup of ELF")
def test_another_openmp_library_in_the_process_is_not_joined(tmp_path):
    source, foreign = tmp_path / "foreign.c", tmp_path / "foreign.so"
    source.write_text(_FOREIGN_LIBRARY)
    build = [*library._compiler(), "-shared", "-fPIC", str(source), "-o", str(foreign)]
    subprocess.run(build, check=True)
    run = [sys.executable, "-c", _IN_A_PROCESS, str(foreign)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_pool_computes_the_same(monkeypatch):
    tensors = _operands()
    expected = shared_prefix_attention(*tensors)
    monkeypatch.setattr(parallel_for, "_pytorch_gomp_parallel", lambda process: None)
    assert torch.equal(shared_prefix_attention(*tensors), expected)


def test_fewer_threads_than_requested_do_all_parts(monkeypatch):
    """As in a nested parallel region of OpenMP."""
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

    monkeypatch.setattr(parallel_for, "_pytorch_gomp_parallel", lambda process: alone)
    assert torch.equal(shared_prefix_attention(*tensors), expected)
    assert asked == [3]


def _in_a_child(tensors, sender):
    torch.set_num_threads(3)
    sender.send(shared_prefix_attention(*tensors).numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_threads():
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
