"""U-ViT under tensor and sequence parallelism computes what one rank does, long skips and masks included."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from helpers.layouts.tensor_shards import assert_shares_compute_the_whole, gaps_of_shares
from helpers.models.tiny_uvit import KINDS, tiny_mup_uvit, uvit_inputs
from helpers.ranks import run_ranks
from megadit.models.layers import skip_linear
from megadit.parallel.collectives import AsyncCollective, local_channels
from megadit.parallel.tensor import TensorLayout

SEQUENCE = skip_linear.SequenceParallelSkipLinear
TOLERANCE = 1e-10  # of float64


def gaps(kind: str, sequence: bool) -> dict[str, float]:
    """Relative difference of output, tokens, input gradient and every parameter's gradient from the whole model's."""
    config = tiny_mup_uvit(64, kind=kind, output_mult=3.0, mlp_time_embed=True, qk_norm="rms", qkv_bias=True)
    return gaps_of_shares(config, sequence, partial(uvit_inputs, config), tap=3)


def every_kind(sequence: bool) -> dict[str, dict[str, float]]:
    return {kind: gaps(kind, sequence) for kind in KINDS}


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_shares_compute_what_the_whole_does(ranks: int, sequence: bool) -> None:
    """Of 18, 17 and 23 tokens, two ranks divide the first alone, four none."""
    assert_shares_compute_the_whole(run_ranks(ranks, every_kind, sequence), TOLERANCE)


def same(x: torch.Tensor, *_args: Any) -> torch.Tensor:
    return x


def own_rows(x: torch.Tensor, layout: TensorLayout) -> AsyncCollective:
    return AsyncCollective(x.unflatten(0, (layout.size, -1))[layout.rank], None)


# What of a long skip is left out, whether under sequence parallelism, and what alone it changes, if that is one thing.
LEFT_OUT: list[tuple[Any, str, Any, bool, str]] = [
    (skip_linear, "reduce_from_tensor_parallel_region", same, False, ""),
    (
        skip_linear,
        "scatter_to_tensor_parallel_region",
        lambda x, layout: local_channels(x, layout).contiguous(),
        False,
        "",
    ),
    (skip_linear, "start_reduce_scatter", own_rows, True, "skip_linear.weight"),
    (SEQUENCE, "bias_for_local_tokens", lambda layer: layer.bias, True, "skip_linear.bias"),
]


def without(owner: Any, name: str, instead: Any, sequence: bool) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(owner, name, instead)
        return gaps("class", sequence)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("owner", "name", "instead", "sequence", "only"), LEFT_OUT, ids=[name for _, name, *_ in LEFT_OUT]
)
def test_no_exchange_of_a_long_skip_can_be_left_out(
    owner: Any, name: str, instead: Any, sequence: bool, only: str
) -> None:
    for gaps in run_ranks(2, without, owner, name, instead, sequence):
        wrong = {key for key, gap in gaps.items() if gap > 1e-2}
        assert wrong
        assert all(key.endswith(only) for key in wrong), wrong
