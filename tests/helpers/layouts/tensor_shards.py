"""Shares of parameters in tests: what a tensor-parallel rank holds of a whole tensor, and models in shares held
against whole ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from helpers.models.weights import randomize
from megadit.config import ModelConfig
from megadit.models import build_model
from megadit.mup.spec import walk_slices
from megadit.parallel.tensor import TensorLayout
from megadit.slices import ShardRegions, contiguous_spans


def share_of(tensor: Tensor, shard_regions: ShardRegions | None) -> Tensor:
    """The elements of ``tensor`` in ``shard_regions``, flat, in the order of the share; all of it for None."""
    if shard_regions is None:
        return tensor.flatten()
    spans = contiguous_spans(tensor.shape, shard_regions, 0, math.prod(tensor.shape))
    return torch.cat(
        [
            tensor.flatten()[span.first : span.first + span.length]
            for span in sorted(spans, key=lambda span: span.offset)
        ]
    )


def this_rank(sequence: bool = False) -> TensorLayout:
    """The layout in which all ranks of a test share every layer."""
    import torch.distributed as dist

    return TensorLayout(dist.get_world_size(), dist.get_rank(), sequence, dist.group.WORLD)


def share_model(config: ModelConfig, parameters: Mapping[str, Tensor], sequence: bool) -> Any:
    """This rank's share, in float64, of the model whose parameters are ``parameters``."""
    model = build_model(config, this_rank(sequence)).double()
    with torch.no_grad():
        for key, p, _, shard_regions in walk_slices(model):
            p.copy_(share_of(parameters[key], shard_regions).view(p.shape))
    return model


def gaps_of_shares(
    config: ModelConfig, sequence: bool, inputs: Callable[[], tuple[Tensor, Tensor, Any]], tap: int
) -> dict[str, float]:
    """Relative difference, in float64, of output, tokens after block ``tap``, input gradient and every parameter's
    gradient of the model that the ranks share from the whole model's; ``inputs`` gives x, t and cond.
    """
    full_model = build_model(config)
    randomize(full_model)
    full_model.double()
    parameters = dict(full_model.named_parameters())
    sharded = share_model(config, parameters, sequence)
    results: list[dict[str, Tensor]] = []
    for model in (full_model, sharded):
        x, t, cond = inputs()
        x = x.double().requires_grad_()
        out, [tokens] = model(x, t, cond, taps=(tap,))
        (out.square().sum() + model.image_tokens(tokens).sin().sum()).backward()
        assert x.grad is not None
        results.append({"out": out.detach(), "tokens": tokens.detach(), "x": x.grad})
    gaps = {key: relative_gap(results[1][key], results[0][key]) for key in results[0]}
    for key, p, _, shard_regions in walk_slices(sharded):
        gaps[key] = relative_gap(p.grad.flatten(), share_of(parameters[key].grad, shard_regions))
    return gaps


def relative_gap(value: Tensor, expected: Tensor) -> float:
    """Distance over the size of what is expected."""
    return float((value - expected).norm() / expected.norm().clamp_min(1e-3))


def assert_shares_compute_the_whole(results: list[dict[str, dict[str, float]]], tolerance: float) -> None:
    """``results``: of every rank, what ``gaps_of_shares`` returned, by the name of the model."""
    for result in results:
        for name, gaps in result.items():
            worst = max(gaps, key=gaps.__getitem__)
            assert gaps[worst] < tolerance, f"{name}: {worst} differs by {gaps[worst]:.1e}"
