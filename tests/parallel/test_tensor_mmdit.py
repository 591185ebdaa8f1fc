"""MMDiT under tensor and sequence parallelism computes what one rank does, both streams and masks included."""

from __future__ import annotations

from functools import partial

import pytest

from helpers.layouts.tensor_shards import assert_shares_compute_the_whole, gaps_of_shares, this_rank
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mmdit, tiny_mup_mmdit
from helpers.ranks import run_ranks
from megadit.models import build_model
from megadit.models.mmdit import model as mmdit

TOLERANCE = 1e-10  # of float64


CONFIGS = {
    # 16 image tokens beside 5 of text, and 9 beside 3, which 2 and 4 ranks do not divide; 4 leave one without any text.
    "masked": (tiny_mup_mmdit(64, pooled=12, qk_norm="rms", mlp="swiglu", output_mult=3.0), [5, 2, 3]),
    "whole": (tiny_mmdit(width=64, heads=4, input_size=6, text={"dim": 20, "max_length": 3}), None),
}


def gaps(name: str, sequence: bool) -> dict[str, float]:
    """Relative difference of output, tokens, input gradient and every parameter's gradient from the whole model's."""
    config, lengths = CONFIGS[name]
    sizes = [
        sum(p.numel() for p in build_model(config, layout, device="meta").parameters())
        for layout in (None, this_rank(sequence))
    ]
    assert sizes[1] < 0.65 * sizes[0]
    return gaps_of_shares(config, sequence, partial(mmdit_inputs, config, lengths=lengths), tap=2)


def every_config(sequence: bool) -> dict[str, dict[str, float]]:
    return {name: gaps(name, sequence) for name in CONFIGS}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_shares_compute_what_the_whole_does(ranks: int, sequence: bool) -> None:
    assert_shares_compute_the_whole(run_ranks(ranks, every_config, sequence), TOLERANCE)


def without_the_sum_of_entry(sequence: bool) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(mmdit, "shared_block_input", lambda x, _layout: x)
        return gaps("masked", sequence)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
def test_the_one_sum_of_what_all_blocks_share_cannot_be_left_out(sequence: bool) -> None:
    for gaps in run_ranks(2, without_the_sum_of_entry, sequence):
        wrong = {key for key, gap in gaps.items() if gap > 1e-2}
        assert {"t_embedder.mlp.0.weight", "y_embedder.mlp.0.weight"} <= wrong
        assert all(key.startswith(("t_embedder.", "y_embedder.")) for key in wrong), wrong
        assert max(gap for key, gap in gaps.items() if key not in wrong) < TOLERANCE


def refusals() -> list[str]:
    model = build_model(tiny_mmdit(), this_rank(sequence=True))
    messages = []
    for size, lengths in (((8, 6), None), (None, 3)):
        x, t, cond = mmdit_inputs(tiny_mmdit(), size=size)
        if lengths:
            assert cond.text is not None
            cond = type(cond)(text=cond.text[:, :lengths])
        with pytest.raises(ValueError) as error:
            model(x, t, cond)
        messages.append(str(error.value))
    return messages


@pytest.mark.distributed
def test_streams_that_are_cut_have_one_length() -> None:
    size, text = run_ranks(2, refusals)[0]
    assert "input_size 8" in size and "5 tokens" in text
