"""What asks for other rounding in the tests is in force in the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import rounding


def test_the_variant_that_was_asked_for_is_in_force() -> None:
    """Of the run that this test is in."""
    environment = rounding.ENVIRONMENTS[rounding.variant()]
    assert environment.items() <= os.environ.items()
    assert torch.get_num_threads() == rounding.threads()
    if rounding.variant() == "baseline":
        assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    if rounding.variant() == "reversed":
        a, b = torch.tensor([[1e8, -1e8, 1.0]]), torch.ones(3, 1)
        assert float(a @ b) == 0.0  # 1 - 1e8 is -1e8 in float32


@pytest.mark.parametrize("name", ["baseline", "reversed"])
def test_a_run_of_tests_reads_it(name: str, root: Path) -> None:
    """The test above, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{_FIRST}"]
    environment = {**os.environ, rounding.VARIABLE: name}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


_FIRST = test_the_variant_that_was_asked_for_is_in_force.__name__


def test_an_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rounding.VARIABLE, "sse9")
    with pytest.raises(pytest.UsageError, match="MEGADIT_TEST_ROUNDING=sse9: choose one of none, baseline, avx2"):
        rounding.variant()


def test_reversed_sums_are_the_same_sums() -> None:
    """In another order: other last bits in float32, the same product."""
    a, b, c = torch.randn(7, 5, 300), torch.randn(7, 300, 4), torch.randn(4)
    plain = a @ b, torch.addmm(c, a[0], b[0])
    with rounding.reversed_sums():
        turned = a @ b, torch.addmm(c, a[0], b[0])
    assert not torch.equal(plain[0], turned[0])
    for one, other in zip(plain, turned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
