"""Every family on every kind of layout trains what one process does; ``benchmarks/layout_differences.py`` says how far.

All have four micro batches a step; some recompute, some have REPA and clip per group.
"""

from __future__ import annotations

import pytest

from helpers.layout_matrix import FAMILIES, LAYOUTS, Matrix, drifts, gaps
from helpers.layout_parity import TOLERANCE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_what_one_process_does(matrix: Matrix, family: str, layout: str) -> None:
    results, expected = matrix.spread(family, layout)
    found = gaps(results, expected)
    assert {what: gap for what, gap in found.items() if gap > TOLERANCE} == {}
    assert drifts(results, layout) == []
