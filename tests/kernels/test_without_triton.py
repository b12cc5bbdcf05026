"""Where Triton is not installed, PyTorch computes on a GPU, and says so once."""

from __future__ import annotations

import logging

import pytest
import torch

from esr_kernels import (
    SampleKeys,
    SamplingParams,
    linear_divergence,
    linear_topk_divergence,
    sample_from_hidden,
    shared_prefix_attention,
    token_logprob,
)
from esr_kernels.attention.groups import RowGroups
from esr_kernels.common import triton_installed
from tests.kernels import imagined_gpu

GPU = torch.device("cuda", 0)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=GPU)


def _divergence() -> None:
    hidden = _empty(9, 16).requires_grad_()
    head, teacher, teacher_head = _empty(300, 16), _empty(9, 8), _empty(320, 8)
    labels = _empty(9, dtype=torch.int64)
    linear_divergence(
        hidden, head, teacher, teacher_head, labels=labels, label_weight=0.1
    ).loss.backward()
    linear_divergence(hidden, head, teacher, teacher_head, "jsd", plan="recompute").loss.backward()


def _logprob() -> None:
    hidden = _empty(9, 16).requires_grad_()
    token_logprob(hidden, _empty(300, 16), _empty(9, dtype=torch.int64)).logprob.sum().backward()


def _topk() -> None:
    hidden = _empty(9, 16).requires_grad_()
    ids, logprobs = _empty(9, 4, dtype=torch.int64), _empty(9, 4)
    linear_topk_divergence(hidden, _empty(300, 16), ids, logprobs).loss.backward()


def _sample() -> None:
    keys = SampleKeys(0, torch.arange(9, device=GPU), 0)
    sample_from_hidden(_empty(9, 16), _empty(300, 16), keys, SamplingParams(temperature=0.7))


def _attention() -> None:
    prefix, suffix = _empty(2, 1, 6, 8), _empty(4, 1, 3, 8)
    lengths, own_lengths = _empty(2, dtype=torch.int64), _empty(4, dtype=torch.int64)
    groups = RowGroups(_empty(2, 2, dtype=torch.int64), _empty(4, dtype=torch.int64))
    query = _empty(4, 2, 8)
    shared_prefix_attention(
        query, prefix, prefix, lengths, suffix, suffix, own_lengths, groups=groups
    )


CALLS = [_divergence, _logprob, _topk, _sample, _attention]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.strip("_"))
def test_no_kernel_is_launched_and_one_warning_is_given(call, monkeypatch, caplog):
    with imagined_gpu.imagined_gpu(monkeypatch), caplog.at_level(logging.WARNING):
        call()
        assert imagined_gpu.launches, "with Triton there are kernels"
        imagined_gpu.launches.clear()
        monkeypatch.setattr(triton_installed, "TRITON", False)
        triton_installed.warn_if_not.cache_clear()
        caplog.clear()
        call()
        call()
    assert imagined_gpu.launches == []
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "Triton is not installed"
    ]


def test_asking_for_triton_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton_installed, "TRITON", False)
    hidden, head = torch.zeros(2, 4), torch.zeros(9, 4)
    with pytest.raises(ValueError, match="needs Triton, which is not installed"):
        linear_divergence(hidden, head, hidden, head, impl="triton")
