"""What the sampler refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

from esr_kernels import SampleKeys, SamplingParams, sample_from_logits

_BAD_PARAMS = [
    ({"temperature": -1.0}, ValueError, r"temperature must be 0 \(greedy\) or .* got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be"),
    ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, "temperature .* at row 1"),
    ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, got str"),
    ({"top_k": -1}, ValueError, r"top_k must be 0 \(off\) or positive, got -1"),
    ({"top_k": 1.5}, TypeError, "top_k must be an integer or a tensor, got float"),
    ({"top_k": torch.tensor([1.0])}, TypeError, "top_k must be int64"),
    ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
    ({"top_p": 1.1}, ValueError, "top_p must be above 0"),
    ({"min_p": 1.1}, ValueError, "min_p must be from 0 to 1, got 1.1"),
    ({"min_p": torch.tensor([1])}, TypeError, "min_p must be floating point"),
]


@pytest.mark.parametrize(("given", "error", "message"), _BAD_PARAMS)
def test_bad_parameters_are_named(given, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**given)


_ROW_IDS = torch.arange(2)
_BAD_CALLS = [
    ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must have shape \[rows, classes\]"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "at least one class"),
    ({"logits": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "logits must be one of"),
    ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
    ({"keys": SampleKeys("a", _ROW_IDS, 0)}, TypeError, "keys.seed must be an int or a tensor"),
    (
        {"keys": SampleKeys(torch.zeros(2, dtype=torch.int64), _ROW_IDS, 0)},
        ValueError,
        r"keys.seed must have shape \[1\], got \[2\]",
    ),
    ({"keys": SampleKeys(1 << 64, _ROW_IDS, 0)}, ValueError, "keys.seed must be from -2"),
    ({"keys": SampleKeys(0, _ROW_IDS[:1], 0)}, ValueError, r"keys.rows must have shape \[2\]"),
    ({"keys": SampleKeys(0, _ROW_IDS.int(), 0)}, TypeError, "keys.rows must be int64"),
    ({"keys": SampleKeys(0, _ROW_IDS, 0.5)}, TypeError, "keys.step must be an int or a tensor"),
    ({"keys": SampleKeys(0, _ROW_IDS, -1)}, ValueError, "keys.step must not be negative"),
    ({"keys": SampleKeys(0, _ROW_IDS, torch.zeros(3).long())}, ValueError, "keys.step must have"),
    ({"params": SamplingParams(torch.ones(3))}, ValueError, r"temperature .* shape \[2\]"),
    ({"params": 0.7}, TypeError, r"params must be SamplingParams\(...\)"),
    ({"params": SamplingParams}, TypeError, r"params must be SamplingParams\(...\)"),
    ({"num_classes": 4}, ValueError, "num_classes must be at most 3"),
    ({"softcap": 0.0}, ValueError, "softcap must be"),
    ({"logit_scale": 0.0}, ValueError, "logit_scale must be"),
    ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[3\]"),
    ({"invalid": torch.zeros(2, dtype=torch.bool)}, ValueError, "invalid must have shape"),
    ({"invalid": torch.tensor([3])}, ValueError, "invalid must hold ids from 0 to 2, got 3"),
    ({"invalid": torch.zeros(3)}, TypeError, "invalid must be one of bool, int64"),
    ({"impl": "cuda"}, ValueError, "impl must be one of"),
]


@pytest.mark.parametrize(("given", "error", "message"), _BAD_CALLS)
def test_bad_arguments_are_named(given, error, message):
    arguments = {"logits": torch.zeros(2, 3), "keys": SampleKeys(0, _ROW_IDS, 0), **given}
    with pytest.raises(error, match=message):
        sample_from_logits(**arguments)
