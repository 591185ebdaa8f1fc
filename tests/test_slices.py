"""The worked example in the docstring of megadit/slices.py."""

from __future__ import annotations

import doctest

from megadit import slices


def test_worked_example():
    results = doctest.testmod(slices)
    assert results.attempted >= 6 and not results.failed
