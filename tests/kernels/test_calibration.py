"""Measured rates: read from a file, strictly, and taken by plans and draws."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from esr_kernels import plan_linear_divergence
from esr_kernels.common import calibration
from esr_kernels.common.calibration import COUNTED, MEASURED, Rates, rates_of, read, write
from esr_kernels.divergence.planner import make_plan

SLOW_FUSED = replace(COUNTED, fused_rate=0.1, draw_rows=7)


@pytest.fixture(autouse=True)
def _fresh():
    rates_of.cache_clear()
    make_plan.cache_clear()
    yield
    rates_of.cache_clear()
    make_plan.cache_clear()


@pytest.fixture
def on_h100(monkeypatch, tmp_path):
    """A file for a GPU that this machine seems to have."""
    path = tmp_path / "calibration.json"
    monkeypatch.setenv("ESR_CALIBRATION", str(path))
    monkeypatch.setattr(calibration, "_gpu_name", lambda device: "NVIDIA H100 80GB HBM3")
    return path


def test_without_a_file_rates_are_those_that_come_with_the_package(on_h100):
    rates, source = rates_of("cuda:0")
    assert (
        rates == MEASURED["NVIDIA H100 80GB HBM3"] and source == "measured, NVIDIA H100 80GB HBM3"
    )
    assert rates == calibration.checked("shipped", asdict(rates))


def test_a_gpu_that_nobody_measured_has_the_counted_ones(on_h100, monkeypatch):
    monkeypatch.setattr(calibration, "_gpu_name", lambda device: "NVIDIA B300")
    assert rates_of("cuda:0") == (COUNTED, "counted")


def test_a_file_comes_before_what_comes_with_the_package(on_h100):
    write(on_h100, "NVIDIA A100", SLOW_FUSED)
    assert rates_of("cuda:0")[0] == MEASURED["NVIDIA H100 80GB HBM3"]
    write(on_h100, "NVIDIA H100 80GB HBM3", SLOW_FUSED)
    rates_of.cache_clear()
    rates, source = rates_of("cuda:0")
    assert rates == SLOW_FUSED and source == f"measured, {on_h100}"
    assert set(read(on_h100)) == {"NVIDIA A100", "NVIDIA H100 80GB HBM3"}


def test_the_file_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("ESR_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.calibration_path() == tmp_path / "esr_kernels" / "calibration.json"


def test_a_plan_takes_and_names_them(on_h100):
    sizes = (2048, 151_936, 512, 512)
    options = {"train_hidden": False, "train_weight": False}
    write(on_h100, "NVIDIA H100 80GB HBM3", replace(COUNTED, fused_rate=1.0, fused_epilogue=0.0))
    fast = plan_linear_divergence(*sizes, **options)
    assert f"rates measured, {on_h100}" in str(fast)
    cost = fast.cost
    write(on_h100, "NVIDIA H100 80GB HBM3", SLOW_FUSED)
    rates_of.cache_clear()
    make_plan.cache_clear()
    slow = plan_linear_divergence(*sizes, **options)
    assert (fast.kind, slow.kind) == ("fused", "recompute")
    assert fast.cost > cost


def test_a_plan_for_the_cpu_has_none():
    on_cpu = plan_linear_divergence(8, 100, 16, 16, device="cpu", dtype=torch.float32)
    assert "rates" not in str(on_cpu)
    assert str(plan_linear_divergence(8, 100, 16, 16)).endswith("rates counted")


def test_a_draw_takes_them(on_h100):
    fused = pytest.importorskip("esr_kernels.sampling.fused_triton")
    assert fused.is_faster(8, 2048, "cuda:0")
    write(on_h100, "NVIDIA H100 80GB HBM3", SLOW_FUSED)
    rates_of.cache_clear()
    assert fused.is_faster(7, 2048, "cuda:0") and not fused.is_faster(8, 2048, "cuda:0")
    assert fused.is_faster(COUNTED.draw_rows_wide, 4096, "cuda:0")


GOOD = asdict(Rates())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must hold JSON"),
        ("[]", "'format' and 'devices'"),
        (json.dumps({"format": 2, "devices": {}}), "must have format 1"),
        (json.dumps({"format": 1, "devices": {"x": {"fused_rate": 0.5}}}), "exactly"),
        (json.dumps({"format": 1, "devices": {"x": {**GOOD, "speed": 1}}}), "exactly"),
        *(
            (json.dumps({"format": 1, "devices": {"x": {**GOOD, name: value}}}), f"x: {name} must")
            for name, value in [
                ("fused_rate", 0),
                ("fused_rate", "0.5"),
                ("fused_rate", True),
                ("fused_rate", float("nan")),
                ("flops_per_byte", 1e9),
                ("fused_epilogue", -1.0),
                ("draw_rows", 1.5),
            ]
        ),
    ],
)
def test_a_file_that_is_not_right_is_refused(on_h100, content, message):
    on_h100.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        rates_of("cuda:0")
    assert str(on_h100) in str(error.value)


def test_rates_out_of_range_are_not_written(on_h100):
    with pytest.raises(ValueError, match="fused_rate must be"):
        write(on_h100, "x", replace(COUNTED, fused_rate=3.0))
    assert not on_h100.exists()
