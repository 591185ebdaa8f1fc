"""Every family on every kind of layout trains what one process does; ``benchmarks/layout_differences.py`` says how far.

All have four micro batches a step; some recompute, some have REPA and clip per group. What is quick here has shared
layers, tokens or stages of every family; DiT has more in ``test_tensor_training.py`` and ``test_pipeline_training.py``.
"""

from __future__ import annotations

import pytest

from helpers.layouts.matrix import FAMILIES, LAYOUTS, LayoutRuns, diverged_replicas, gaps
from helpers.layouts.parity import TOLERANCE, WEIGHT_TOLERANCE

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

QUICK = {
    "dit": ("tp2 sequence pp2 dp2",),
    "pixart": ("tp2 pp2", "tp2 sequence"),
    "uvit": ("pp4", "tp2 sequence", "tp2 dp2 zero3"),
    "mmdit": ("tp2 pp2", "tp2 dp2 zero2"),
}
CELLS = [
    pytest.param(family, layout, marks=() if layout in QUICK[family] else pytest.mark.slow, id=f"{layout}-{family}")
    for layout in LAYOUTS
    for family in FAMILIES
]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> LayoutRuns:
    return LayoutRuns(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(("family", "layout"), CELLS)
def test_a_layout_trains_what_one_process_does(matrix: LayoutRuns, family: str, layout: str) -> None:
    results, expected = matrix.on_layout(family, layout)
    measured = gaps(results, expected)
    allowed = {"weights": WEIGHT_TOLERANCE, "average": WEIGHT_TOLERANCE}
    assert {quantity: gap for quantity, gap in measured.items() if gap > allowed.get(quantity, TOLERANCE)} == {}
    assert diverged_replicas(results, layout) == []
