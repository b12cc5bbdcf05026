"""Memory is marked for huge pages, as /proc/self/smaps shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esr_kernels.cpu import huge_pages, on_huge_pages


def _flags(address: int) -> list[str]:
    """Of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest
    pytest.skip("this system does not show the flags of a mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages"
)
def test_large_tensors_are_marked_unless_switched_off(monkeypatch):
    fresh = torch.empty(12 << 20)
    middle = fresh.data_ptr() + fresh.nbytes // 2
    monkeypatch.setattr(huge_pages, "is_enabled", lambda: False)
    assert on_huge_pages(fresh) is fresh
    assert "hg" not in _flags(middle)
    monkeypatch.setattr(huge_pages, "is_enabled", lambda: True)
    assert on_huge_pages(fresh) is fresh
    assert "hg" in _flags(middle)
    assert fresh.fill_(2).eq(2).all()
