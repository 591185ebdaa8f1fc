"""A tensor-parallel pipeline of four stages has the gradients of the unsharded model, in float64, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.layouts.tensor_shards import relative_gap, share_model, share_of
from helpers.models.tiny_dit import dit_inputs, tiny_mup_dit
from helpers.models.tiny_mmdit import mmdit_inputs, tiny_mup_mmdit
from helpers.models.tiny_pixart import pixart_inputs, tiny_mup_pixart
from helpers.models.tiny_uvit import tiny_mup_uvit, uvit_inputs
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from megadit.models import build_model
from megadit.models.chunk import ModelChunk
from megadit.models.stages import StageIO
from megadit.mup.spec import walk_slices

# REPA's block is the first of the second stage, so that its projection crosses two wires; 9 image tokens.
SIZES: dict[str, Any] = {
    "width": 64,
    "depth": 4,
    "input_size": 6,
    "qk_norm": "rms",
    "repa": {"block": 2, "feature_dim": 12, "hidden": 24},
}
MODELS: dict[str, tuple[Any, Any]] = {
    "dit": (tiny_mup_dit(**SIZES, mlp="swiglu"), dit_inputs),
    "pixart": (tiny_mup_pixart(**SIZES), pixart_inputs),
    "uvit": (tiny_mup_uvit(**SIZES, kind="text", qkv_bias=True, mlp_time_embed=True), uvit_inputs),
    "mmdit": (tiny_mup_mmdit(**SIZES, pooled=12), mmdit_inputs),
}


def loss_of(output: Tensor, projected: Tensor) -> Tensor:
    return output.square().mean() + projected.sin().mean()


def floats(stage_io: StageIO) -> list[Tensor]:
    return [tensor for tensor in stage_io if tensor.is_floating_point()]


def run_chunks(chunks: list[Any], stage_io: StageIO) -> None:
    """Forward and backward, with nothing between two chunks but the packed state and the gradients of its floats."""
    tape = []
    for chunk in chunks:
        received = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in stage_io)
        stage_io = chunk(received)
        tape.append((received, stage_io))
    gradients: list[Any] = [None]
    for received, sent in reversed(tape):
        last = gradients == [None]
        torch.autograd.backward([loss_of(*sent)] if last else floats(sent), gradients)
        gradients = [x.grad for x in floats(received)]
        assert received is tape[0][0] or all(gradient is not None for gradient in gradients)


def gaps(sequence: bool, recompute: str) -> dict[str, dict[str, float]]:
    """By family: relative difference of every parameter's gradient from the whole model's."""
    by_family: dict[str, dict[str, float]] = {}
    for family, (config, inputs) in MODELS.items():
        whole = build_model(config)
        randomize(whole)
        whole.double()
        expected = dict(whole.named_parameters())
        x, t, cond = inputs(config)
        loss_of(*whole(x.double(), t, cond, project=True)).backward()
        chunks = []
        for low, high in ((0, 2), (2, 3), (3, 4), (4, len(whole.stages()))):
            model = share_model(config, expected, sequence)
            model.recompute = recompute
            chunks.append(ModelChunk(model, low, high))
            chunks[-1].project = True
        run_chunks(chunks, chunks[0].model.packed_inputs(x.double(), t, cond))
        by_family[family] = {
            key: relative_gap(p.grad.flatten(), share_of(expected[key].grad, shard_regions))
            for chunk in chunks
            for key, p, _, shard_regions in walk_slices(chunk.model)
        }
        assert by_family[family].keys() == expected.keys()
    return by_family


@pytest.mark.distributed
@pytest.mark.parametrize(("sequence", "recompute"), [(False, "none"), (True, "selective"), (False, "full")])
def test_segments_have_the_gradients_of_the_whole(sequence: bool, recompute: str) -> None:
    for result in run_ranks(2, gaps, sequence, recompute):
        for family, family_gaps in result.items():
            worst = max(family_gaps, key=family_gaps.__getitem__)
            assert family_gaps[worst] < 1e-10, f"{family}: {worst} differs by {family_gaps[worst]:.1e}"
