"""PixArt in shares: tensor and sequence parallel ranks compute what one rank does, tables and masks included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.shards import share_of, this_rank
from helpers.tiny_dit import randomize
from helpers.tiny_pixart import pixart_inputs, tiny_pixart, tiny_pixart_mup
from megadit.models import build_model, pixart
from megadit.mup.spec import walk_slices

TOLERANCE = 1e-10  # of float64


CONFIGS = {
    # 16 tokens with all kinds of gains, and 9, which neither 2 nor 4 ranks divide; texts of different lengths or whole.
    "masked": (tiny_pixart_mup(64, qk_norm="rms", output_mult=3.0), True),
    "whole": (tiny_pixart(width=64, heads=4, mlp="swiglu", input_size=6, qkv_bias=False), False),
}


def gaps(name: str, sequence: bool) -> dict[str, float]:
    """Relative difference of output, tokens, input gradient and every parameter's gradient from the whole model's."""
    config, masked = CONFIGS[name]
    whole = build_model(config)
    randomize(whole)
    whole.double()
    wanted = dict(whole.named_parameters())
    sharded = build_model(config, this_rank(sequence)).double()
    with torch.no_grad():
        for key, p, _, boxes in walk_slices(sharded):
            p.copy_(share_of(wanted[key], boxes).view(p.shape))
    results: list[dict[str, torch.Tensor]] = []
    for model in (whole, sharded):
        x, t, cond = pixart_inputs(config, masked=masked)
        x = x.double().requires_grad_()
        out, [tokens] = model(x, t, cond, taps=(1,))
        (out.square().sum() + model.image_tokens(tokens).sin().sum()).backward()
        assert x.grad is not None
        results.append({"out": out.detach(), "tokens": tokens.detach(), "x": x.grad})
    found = {key: _relative(results[1][key], results[0][key]) for key in results[0]}
    for key, p, _, boxes in walk_slices(sharded):
        found[key] = _relative(p.grad.flatten(), share_of(wanted[key].grad, boxes))
    return found


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm().clamp_min(1e-3))


def every_config(sequence: bool) -> dict[str, dict[str, float]]:
    return {name: gaps(name, sequence) for name in CONFIGS}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_shares_compute_what_the_whole_does(ranks: int, sequence: bool) -> None:
    results: list[Any] = run_ranks(ranks, every_config, sequence)
    for result in results:
        for name, found in result.items():
            worst = max(found, key=found.__getitem__)
            assert found[worst] < TOLERANCE, f"{name}: {worst} differs by {found[worst]:.1e}"


def without_the_sum_of_entry(sequence: bool) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(pixart, "enter_blocks", lambda x, _layout: x)
        return gaps("masked", sequence)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
def test_the_one_sum_of_what_all_blocks_share_cannot_be_left_out(sequence: bool) -> None:
    for found in run_ranks(2, without_the_sum_of_entry, sequence):
        seen = {key for key, gap in found.items() if gap > 1e-2}
        assert {"y_embedder.y_proj.fc1.weight", "y_embedder.y_proj.fc1.bias"} <= seen
        assert all(key.startswith("y_embedder.") for key in seen), seen
        assert max(gap for key, gap in found.items() if key not in seen) < TOLERANCE
