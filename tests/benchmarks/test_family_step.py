"""benchmarks/family_step.py measures what it says: both arms compute the same, and memory is counted to the byte."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from helpers.ranks import ROOT
from helpers.scripts import import_script


@pytest.fixture(scope="module")
def family_step() -> ModuleType:
    module = import_script(ROOT / "benchmarks/family_step.py")
    module.SIZES = {"tiny": (64, 2, 4, 2)}
    return module


@pytest.mark.parametrize("family", ["dit", "pixart", "uvit", "mmdit"])
def test_both_arms_compute_the_same(family_step: Any, family: str) -> None:
    if family != "uvit":
        pytest.importorskip("diffusers")
    arms, gap = family_step.arms_of(family, "tiny", "cpu", "fp32")
    # diffusers' DiT spaces the timestep's frequencies differently: the same work, not the same numbers.
    assert gap < (0.5 if family == "dit" else 1e-5)
    row = family_step.compare(arms, 0, 1, "cpu")
    assert set(row) == {"ms", "time_ratio", "peak_mb", "memory_ratio"} and 0.5 < row["memory_ratio"] < 1.5


def test_peak_of_live_bytes(family_step: Any) -> None:
    """Two blocks of a megabyte at a time at most; views and what was there before do not count."""
    before = torch.zeros(1 << 18)

    def work() -> None:
        first = before + 1
        first.view(2, -1).mul_(2)
        second = first * 2
        del first
        third = second + 1
        del second, third

    assert family_step.live_bytes_peak(work, "cpu") == 2 << 20
