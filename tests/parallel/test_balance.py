"""Cuts of a pipeline into chunks of equal FLOPs, and the parameters that each chunk holds."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.models.tiny_dit import dit_inputs, tiny_dit
from megadit.models import build_model
from megadit.models.chunk import build_chunk
from megadit.mup.example import example_conditioning
from megadit.mup.spec import param_specs
from megadit.parallel.tensor import TensorLayout, is_shard
from megadit.parallel.topology import Topology, balanced_cuts
from megadit.plan.bubble import bubble_share
from megadit.plan.flops import stage_flops


def test_no_other_cut_has_a_cheaper_dearest_run():
    costs = [3, 1, 4, 1, 5, 9, 2, 6]
    for parts in range(1, len(costs) + 1):
        cuts = balanced_cuts(costs, parts)
        assert cuts[0] == 0 and cuts[-1] == len(costs) and len(set(cuts)) == parts + 1
        dearest = max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts))
        others = ([0, *inner, len(costs)] for inner in itertools.combinations(range(1, len(costs)), parts - 1))
        assert dearest == min(max(sum(costs[a:b]) for a, b in itertools.pairwise(other)) for other in others)


def test_more_parts_than_stages_are_refused():
    with pytest.raises(ValueError, match="2 stages cannot be cut into 3"):
        balanced_cuts([1, 1], 3)


def test_bubble_of_the_schedule():
    assert bubble_share(1, 4) == 0
    assert bubble_share(4, 4) == pytest.approx(3 / 7)


def test_the_stages_cost_what_the_model_does():
    config = tiny_dit(depth=3)
    model = build_model(config, device="meta")
    x = torch.empty(1, config.in_channels, config.input_size, config.input_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.empty(1, device="meta"), example_conditioning(config, [0]).to("meta"))
    assert sum(stage_flops(config)) == counter.get_total_flops()


def test_chunks_hold_each_parameter_once_and_compute_the_model():
    config = tiny_dit(depth=3)
    whole = build_model(config, seed=2)
    cuts = [0, 2, 4, 5]
    chunks = [build_chunk(config, cuts, stage, seed=2) for stage in range(3)]
    parameters = [dict(chunk.model.named_parameters()) for chunk in chunks]
    assert sum(len(chunk_parameters) for chunk_parameters in parameters) == len(param_specs(whole))
    for chunk_parameters in parameters:
        for name, p in chunk_parameters.items():
            assert torch.equal(p, whole.get_parameter(name))
    x, t, cond = dit_inputs(config)
    stage_io = whole.packed_inputs(x, t, cond)
    for chunk in chunks:
        stage_io = chunk(stage_io)
    assert torch.equal(stage_io, whole(x, t, cond))


def test_shares_of_a_chunk_are_marked():
    """``to_empty`` makes new parameters, which know nothing of the marks of the old ones."""
    chunk = build_chunk(tiny_dit(depth=3), [0, 2, 5], 0, TensorLayout(2, 0))
    marked = {name for name, p in chunk.model.named_parameters() if is_shard(p)}
    assert "blocks.0.attn.qkv.weight" in marked and "x_embedder.proj.weight" not in marked


def test_places_are_those_of_deepspeed():
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed_topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    for rank in range(12):
        ours, coord = Topology(12, rank, tensor=2, pipeline=2), deepspeed_topology.get_coord(rank)
        assert (ours.pipeline_rank, ours.data_rank, ours.tensor_rank) == (coord.pipe, coord.data, coord.model)
    first = Topology(12, 0, tensor=2, pipeline=2)
    for axis, name in (("tensor", "model"), ("data", "data"), ("pipeline", "pipe")):
        assert sorted(first.rank_lists(axis)) == sorted(deepspeed_topology.get_axis_comm_lists(name))
