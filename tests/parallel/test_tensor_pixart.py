"""PixArt under tensor and sequence parallelism computes what one rank does, tables and masks included."""

from __future__ import annotations

from functools import partial

import pytest

from helpers.layouts.tensor_shards import assert_shares_compute_the_whole, gaps_of_shares
from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart, tiny_pixart
from helpers.ranks import run_ranks
from megadit.models.pixart import model as pixart

TOLERANCE = 1e-10  # of float64


CONFIGS = {
    # 16 tokens with all kinds of gains, and 9, which neither 2 nor 4 ranks divide; texts of different lengths or whole.
    "masked": (tiny_mup_pixart(64, qk_norm="rms", output_mult=3.0), True),
    "whole": (tiny_pixart(width=64, heads=4, mlp="swiglu", input_size=6, qkv_bias=False), False),
}


def gaps(name: str, sequence: bool) -> dict[str, float]:
    """Relative difference of output, tokens, input gradient and every parameter's gradient from the whole model's."""
    config, masked = CONFIGS[name]
    return gaps_of_shares(config, sequence, partial(pixart_inputs, config, masked=masked), tap=1)


def every_config(sequence: bool) -> dict[str, dict[str, float]]:
    return {name: gaps(name, sequence) for name in CONFIGS}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_shares_compute_what_the_whole_does(ranks: int, sequence: bool) -> None:
    assert_shares_compute_the_whole(run_ranks(ranks, every_config, sequence), TOLERANCE)


def without_the_sum_of_entry(sequence: bool) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(pixart, "shared_block_input", lambda x, _layout: x)
        return gaps("masked", sequence)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
def test_the_one_sum_of_what_all_blocks_share_cannot_be_left_out(sequence: bool) -> None:
    for gaps in run_ranks(2, without_the_sum_of_entry, sequence):
        wrong = {key for key, gap in gaps.items() if gap > 1e-2}
        assert {"y_embedder.y_proj.fc1.weight", "y_embedder.y_proj.fc1.bias"} <= wrong
        assert all(key.startswith("y_embedder.") for key in wrong), wrong
        assert max(gap for key, gap in gaps.items() if key not in wrong) < TOLERANCE
