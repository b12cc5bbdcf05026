"""Decode attention over a shared prefix on the GPU's code path, as `test_sanitize` is for the
divergence: ragged groups, splits, a window, a softcap, caches that are views."""

from __future__ import annotations

import pytest
import torch

from esr_kernels.attention.op import shared_prefix_attention
from tests.kernels.attention.test_op import _assert_close, _case, _plain, _truth


@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 3.0}], ids=["plain", "all"])
@pytest.mark.parametrize("length", [37, 300], ids=["one split", "splits"])
def test_prefix_attention_on_the_gpu_path(length, options):
    tensors, groups = _case(length=length, own=70, dtype=torch.float16)
    truth = _truth(tensors, groups, **options)
    plain = (_plain(tensors, groups, **options) - truth).norm() / truth.norm()
    views = list(tensors)
    for at in (4, 5):
        views[at] = torch.nn.functional.pad(tensors[at], (0, 0, 0, 3))[:, :, :-3]
    out = shared_prefix_attention(*views, groups=groups, **options, impl="triton")
    _assert_close(out, truth, 1.5 * float(plain))


def test_no_suffix_and_no_groups():
    tensors, _ = _case((0, 0, 1, 1), prompts=2, own=0, dtype=torch.float16)
    truth = _truth(tensors)
    out = shared_prefix_attention(*tensors, impl="triton")
    _assert_close(out, truth, 0.01)
