"""Parameters that tensor-parallel ranks replicate have bit-identical gradients on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.layouts.tensor_shards import this_rank
from helpers.models.tiny_dit import dit_inputs, tiny_mup_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mup_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart
from helpers.models.tiny_uvit import tiny_mup_uvit, uvit_inputs
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from megadit.models import build_model
from megadit.mup.spec import walk_slices

REPA = {"block": 1, "feature_dim": 12, "hidden": 24}
# 9 image tokens, which neither 2 nor 4 ranks divide; every kind of gain and bias.
MODELS: dict[str, tuple[Any, Any]] = {
    "dit": (tiny_mup_dit(64, input_size=6, qk_norm="rms", mlp="swiglu", repa=REPA), dit_inputs),
    "pixart": (tiny_mup_pixart(64, input_size=6, qk_norm="rms", repa=REPA), pixart_inputs),
    "uvit": (tiny_mup_uvit(64, kind="text", input_size=6, qk_norm="rms", qkv_bias=True, repa=REPA), uvit_inputs),
    "mmdit": (tiny_mup_mmdit(64, input_size=6, qk_norm="rms", pooled=12, repa=REPA), mmdit_inputs),
}


def replicated_gradients(sequence: bool) -> dict[str, dict[str, torch.Tensor]]:
    """By family: the gradients of the parameters that are no shares."""
    gradients = {}
    for family, (config, inputs) in MODELS.items():
        model = build_model(config, this_rank(sequence))
        randomize(model)
        model.zero_grad(set_to_none=True)
        out, projected = model(*inputs(config), project=True)
        (out.square().mean() + projected.sin().mean()).backward()
        gradients[family] = {
            name: p.grad
            for name, p, _, shard_regions in walk_slices(model)
            if shard_regions is None and p.grad is not None
        }
    return gradients


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "sequence"), [(2, False), (2, True), (4, False), (4, True)])
def test_whole_parameters_have_one_gradient(ranks: int, sequence: bool) -> None:
    first, *others = run_ranks(ranks, replicated_gradients, sequence)
    for family, expected in first.items():
        assert expected
        for other in others:
            assert other[family].keys() == expected.keys()
            differ = [name for name, grad in expected.items() if not torch.equal(other[family][name], grad)]
            assert differ == [], f"{family} of {ranks} ranks"
