"""Tensor- and sequence-parallel layers against unsharded ones in float64, and the effect of left-out collectives."""

from dataclasses import replace

import pytest
import torch

from helpers.layouts.tensor_shards import share_of, this_rank
from helpers.models.tiny_dit import dit_inputs, tiny_dit, tiny_mup_dit
from helpers.models.tiny_mmdit import tiny_mup_mmdit
from helpers.models.tiny_pixart import tiny_mup_pixart
from helpers.models.tiny_uvit import tiny_mup_uvit
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from megadit.models import build_model
from megadit.mup.init import init_parameters
from megadit.mup.spec import param_specs, walk_slices
from megadit.parallel import collectives
from megadit.parallel.tensor import TensorLayout, is_shard

TOLERANCE = 1e-10  # of float64; measured: 7e-15

CONFIGS = {
    # 16 tokens in a muP model with all kinds of gains, and 9 tokens, which neither 2 nor 4 ranks divide.
    "qk-norm": tiny_mup_dit(64, qk_norm="rms", output_mult=3.0),
    "swiglu": tiny_dit(width=64, heads=4, mlp="swiglu", input_size=6, num_classes=0, learn_sigma=False),
}


def gaps(name, sequence, faults=()):
    """Largest difference of output, input gradient and every parameter's gradient from the whole model's."""
    config = CONFIGS[name]
    whole = build_model(config)
    randomize(whole)
    whole.double()
    outcomes = []
    sharded = build_model(config, this_rank(sequence)).double()
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        for key, p, _, shard_regions in walk_slices(sharded):
            p.copy_(share_of(parameters[key], shard_regions).view(p.shape))
    for fault in faults:
        fault(sharded)
    for model in (whole, sharded):
        x, t, cond = dit_inputs(config)
        x = x.double().requires_grad_()
        out, [tokens] = model(x, t, cond, taps=(1,))
        (out.square().sum() + tokens.sin().sum()).backward()
        outcomes.append({"out": out.detach(), "tokens": tokens.detach(), "x": x.grad})
    gaps = {key: relative(outcomes[1][key], outcomes[0][key]) for key in outcomes[0]}
    for key, p, _, shard_regions in walk_slices(sharded):
        gaps[key] = relative(p.grad.flatten(), share_of(parameters[key].grad, shard_regions))
    return gaps


def relative(value, expected):
    return float((value - expected).norm() / expected.norm().clamp_min(1e-3))


def every_config(sequence):
    return {name: gaps(name, sequence) for name in CONFIGS}


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_compute_what_the_whole_does(ranks, sequence):
    for result in run_ranks(ranks, every_config, sequence):
        for name, gaps in result.items():
            worst = max(gaps, key=gaps.get)
            assert gaps[worst] < TOLERANCE, f"{name}: {worst} differs by {gaps[worst]:.1e}"


def no_sum(monkey, name):
    def break_it(_model):
        monkey.setattr(collectives, name, lambda x, layout: x)

    return break_it


def drop_multiplier(_monkey, _name):
    def break_it(model):
        specs = model.final_layer.linear.param_specs
        specs["weight"] = replace(specs["weight"], forward_mult=1.0)

    return break_it


def broken(kind, name, sequence):
    with pytest.MonkeyPatch.context() as monkey:
        return gaps("qk-norm", sequence, [{"sum": no_sum, "mult": drop_multiplier}[kind](monkey, name)])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "name", "sequence"),
    [("sum", "_all_reduce", False), ("sum", "_all_reduce", True), ("mult", "", False)],
)
def test_a_sum_or_multiplier_left_out_is_seen(kind, name, sequence):
    gaps = run_ranks(2, broken, kind, name, sequence)[0]
    assert max(gaps.values()) > 1e-2


DRAWN = (
    tiny_mup_dit(64),
    tiny_dit(width=64, heads=4, mlp="swiglu", init="original"),
    tiny_mup_pixart(64, adaln_init="fan_in"),
    tiny_mup_uvit(64, mlp_time_embed=True),
    tiny_mup_mmdit(64, pooled=12, mlp="swiglu", adaln_init="fan_in"),
)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_share_is_drawn_as_the_same_elements_of_the_whole(ranks):
    for rank in range(ranks):
        for config in DRAWN:
            whole = dict(build_model(config, seed=3).named_parameters())
            for name, p, _, shard_regions in walk_slices(build_model(config, TensorLayout(ranks, rank), seed=3)):
                assert torch.equal(p.flatten(), share_of(whole[name], shard_regions)), name


def test_shares_are_marked_and_keep_global_specs():
    config = tiny_mup_dit(64, qk_norm="rms")
    whole, share = build_model(config), build_model(config, TensorLayout(2, 1), device="meta")
    assert param_specs(share) == param_specs(whole)
    for name, p, spec, shard_regions in walk_slices(share):
        assert is_shard(p) == (shard_regions is not None) == (p.numel() * 2 == spec.numel), name
    cut = {name for name, _, _, shard_regions in walk_slices(share) if shard_regions}
    assert {name.split(".", 2)[2] for name in cut if name.startswith("blocks.0.")} == {
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    }


def test_ranks_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="3 tensor-parallel ranks do not divide 2 attention heads"):
        build_model(tiny_dit(), TensorLayout(3, 0), device="meta")


def test_a_share_made_on_meta_is_filled_as_one_made_at_once():
    layout = TensorLayout(2, 1)
    late = build_model(tiny_dit(), layout, device="meta").to_empty(device="cpu")
    init_parameters(late, 4)
    at_once = dict(build_model(tiny_dit(), layout, seed=4).named_parameters())
    assert all(torch.equal(p, at_once[name]) for name, p in late.named_parameters())
