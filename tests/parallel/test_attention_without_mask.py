"""Attention by lengths under tensor, sequence and pipeline parallelism computes what one process does by a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers.kernels.flash import BACKENDS, CALLS, flash_on_cpu
from helpers.layouts.matrix import LAYOUTS, gaps, matrix_config
from helpers.layouts.parity import TOLERANCE, WEIGHT_TOLERANCE
from helpers.layouts.tensor_shards import assert_shares_compute_the_whole, gaps_of_shares
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mup_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart
from helpers.ranks import run_ranks
from helpers.training import train_rank
from megadit.conditioning import Conditioning

pytestmark = pytest.mark.distributed


def shares(sequence: bool) -> dict[str, dict[str, float]]:
    """By model and backend: the distance of two ranks' shares from the whole model."""

    def mmdit() -> tuple[Tensor, Tensor, Conditioning]:
        x, t, cond = mmdit_inputs(configs["mmdit"], lengths=[5, 0, 3])
        return x, t, cond.with_lengths()

    def pixart() -> tuple[Tensor, Tensor, Conditioning]:
        x, t, cond = pixart_inputs(configs["pixart"])
        return x, t, replace(cond, text_lengths=None)  # found on every rank

    configs = {"mmdit": tiny_mup_mmdit(64, qk_norm="rms"), "pixart": tiny_mup_pixart(64)}
    results = {}
    for backend in BACKENDS:
        with flash_on_cpu(backend):
            for family, inputs in (("mmdit", mmdit), ("pixart", pixart)):
                results[f"{family} {backend}"] = gaps_of_shares(configs[family], sequence, inputs, tap=1)
            assert {heads for _, (_, heads, _) in CALLS} == {2, 4}  # of a share, and of the whole
    return results


@pytest.mark.parametrize("sequence", [False, True])
def test_shares_compute_what_the_whole_does(sequence: bool) -> None:
    assert_shares_compute_the_whole(run_ranks(2, shares, sequence), 1e-10)


def train_by_lengths(config: Any, folder: str) -> dict[str, Any]:
    with flash_on_cpu("varlen"):
        return train_rank(config, folder) | {"calls": len(CALLS)}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("mmdit", "tp2 pp2"),
        pytest.param("pixart", "tp2 pp2", marks=pytest.mark.slow),
        pytest.param("mmdit", "tp2 dp2 zero3", marks=pytest.mark.slow),
        pytest.param("pixart", "tp2 sequence", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_what_it_does_by_a_mask(family: str, layout: str, tmp_path: Path) -> None:
    """Stages, recomputation and dropped captions included."""
    world, parallel, full, recompute = LAYOUTS[layout]
    [expected] = run_ranks(1, train_rank, matrix_config(family, tmp_path, full), str(tmp_path / "alone"), timeout=400)
    config = matrix_config(family, tmp_path, full, recompute, world=world, **parallel)
    results = run_ranks(world, train_by_lengths, config, str(tmp_path / "by-lengths"), timeout=400)
    assert all(result["calls"] for result in results)
    allowed = {"weights": WEIGHT_TOLERANCE, "average": WEIGHT_TOLERANCE}
    measured = gaps(results, expected)
    assert {quantity: gap for quantity, gap in measured.items() if gap > allowed.get(quantity, TOLERANCE)} == {}
