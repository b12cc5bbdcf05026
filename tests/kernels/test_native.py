"""Sharing rows out among threads: PyTorch's team, a pool where there is none, and after a fork."""

from __future__ import annotations

import ctypes
import multiprocessing
import os

import pytest
import torch

from esr_kernels import native
from esr_kernels.prefix_attention import shared_prefix_attention
from tests.kernels.test_prefix_attention import _case

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
