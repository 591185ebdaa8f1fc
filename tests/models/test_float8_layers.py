"""Which layers multiply in FP8, and that ranks that share one multiply the same FP8 numbers as one rank would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.layouts.tensor_shards import share_of, this_rank
from helpers.models.tiny_dit import dit_inputs, tiny_dit, tiny_mup_dit
from helpers.models.tiny_mmdit import tiny_mmdit
from helpers.models.tiny_pixart import tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.models.weights import randomize
from helpers.ranks import run_ranks
from megadit.config import ModelConfig
from megadit.config.schema.float8 import Float8Config
from megadit.models import build_model
from megadit.models.build import parametrization
from megadit.models.float8 import float8_candidates, float8_products, set_float8
from megadit.models.layers.linear import ColumnParallelLinear, MuLinear, RowParallelLinear
from megadit.models.layers.skip_linear import skip_for_sharded_linear, skip_linear
from megadit.parallel.collectives import gather_sequence, local_channels, scatter_sequence
from megadit.parallel.tensor import TensorLayout, building
from megadit_kernels.float8 import Float8Products
from megadit_kernels.linear import OWN_PRECISION

BATCH, TOKENS, WIDTH, OUT = 2, 5, 32, 48
SMALL = 2.0**-14
SCALINGS = ["tensor", "row"]


def names_of(config: ModelConfig) -> set[str]:
    """Layers of the first block that multiply in FP8, by their names in the block."""
    model = build_model(config, device="meta")
    names = [name for name, _ in float8_candidates(model)]
    assert len(names) == len(set(names)) and set(names) <= {
        name.removesuffix(".weight") for name in dict(model.named_parameters())
    }
    return {name.split(".", 2)[2] for name in names if name.split(".")[1] == "0"}


def test_the_blocks_linears_on_tokens_multiply_in_fp8() -> None:
    attention, mlp = {"attn.qkv", "attn.proj"}, {"mlp.fc1", "mlp.fc2"}
    assert names_of(tiny_dit()) == attention | mlp
    cross = {"cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"}
    assert names_of(tiny_pixart()) == attention | mlp | cross
    assert names_of(tiny_uvit()) == attention | mlp | {"skip_linear"}
    streams = {f"{stream}.{name}" for stream in ("x_block", "context_block") for name in attention | mlp}
    assert names_of(tiny_mmdit()) == streams


def test_named_layers_stay_in_bf16() -> None:
    model = build_model(tiny_dit())
    count = set_float8(model, Float8Config(scaling="row", bf16_layers=("blocks.0.*", "*.mlp.fc2")))
    in_fp8 = {name for name, layer in float8_candidates(model) if isinstance(layer.products, Float8Products)}
    assert in_fp8 == {"blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"} and count == 3
    others = [layer for layer in model.modules() if isinstance(layer, MuLinear) and layer.products is OWN_PRECISION]
    assert len(others) == len([layer for layer in model.modules() if isinstance(layer, MuLinear)]) - 3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_model_in_fp8_is_near_the_model(scaling: Any) -> None:
    config = tiny_dit(width=64, heads=4)
    model = build_model(config)
    randomize(model)
    inputs = dit_inputs(config)
    results = []
    for fp8 in (False, True):
        if fp8:
            set_float8(model, Float8Config(scaling=scaling))
        model.zero_grad()
        out = model(*inputs)
        out.square().mean().backward()
        results.append(torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in model.parameters())]))
    assert 1e-3 < float((results[1] - results[0]).norm() / results[0].norm()) < 0.1


def spread(*size: int, dim: int, seed: int, of_rank: int = 1) -> Tensor:
    """Numbers of which a rank's half along ``dim`` is 2^14 smaller, and so FP8's subnormal ones beside the other's."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    half = (size[dim] + 1) // 2
    values.narrow(dim, of_rank * half, size[dim] - half if of_rank else half).mul_(SMALL)
    return values


def made(kind: str, layout: TensorLayout | None) -> Any:
    """The layer of one rank of ``layout``."""
    param = parametrization(tiny_mup_dit(WIDTH, role_hps={"hidden": {"mult": 0.5}}))
    with building(layout):
        if kind == "skip":
            return skip_linear(param.width_dim(), param.width_dim(2), param, TOKENS)
        if kind == "column":
            return ColumnParallelLinear(param.width_dim(), param.width_dim(OUT / WIDTH), param, tokens=TOKENS)
        return RowParallelLinear(param.width_dim(), param.width_dim(OUT / WIDTH), param, tokens=TOKENS)


def layer_gaps(kind: str, sequence: bool, scaling: Any, fault: bool) -> dict[str, float]:
    """Largest differences, relative to the largest value of each row, of this rank's part from the whole layer's."""
    layout, fp8 = this_rank(sequence), Float8Config(scaling=scaling)
    whole, own = made(kind, None), made(kind, layout)
    assert whole.forward_mult == own.forward_mult == 0.5
    whole.products, own.products = float8_products(whole, fp8), float8_products(own, fp8)
    if fault:
        own.products = Float8Products(scaling, own.products.sharded, lambda amax: amax)
    out_width, split = (WIDTH if kind == "skip" else OUT), own.split.get("weight", 1)
    columns = whole.weight.shape[1]
    with torch.no_grad():
        pieces = columns // WIDTH if split == 1 else 1  # of the skip's two, each is cut by itself
        weight = [spread(out_width, columns // pieces, dim=split, seed=piece) for piece in range(pieces)]
        whole.weight.copy_(torch.cat(weight, dim=1))
        whole.bias.copy_(spread(out_width, dim=0, seed=2) * SMALL)
        for name, parameter in own.named_parameters():
            share = share_of(getattr(whole, name), own.param_regions.get(name))
            parameter.copy_(share.view(parameter.shape))
    # Of two operands of a product one is small on each rank, so that both ranks' terms count.
    dim = 1 if kind == "skip" and sequence else 2
    x = spread(BATCH, TOKENS, WIDTH, dim=dim, seed=3, of_rank=1 if dim == 1 or kind == "column" else 0)
    grad = spread(BATCH, TOKENS, out_width, dim=dim, seed=4, of_rank=0)

    whole_inputs = [x.clone().requires_grad_()] + ([(x * x.sign()).clone().requires_grad_()] if kind == "skip" else [])
    own_inputs = [tensor.detach().clone().requires_grad_() for tensor in whole_inputs]
    expected = whole(*whole_inputs)
    expected.backward(grad)
    out = own(*cut_inputs(kind, own_inputs, layout))
    part = part_of_output(kind, layout)
    out.backward(part(grad).contiguous())

    if kind == "column":
        gaps = {"out": gap(out.detach(), part(expected.detach()))}
    else:
        gaps = {"out": gap(gather_sequence(out.detach(), layout, TOKENS), expected.detach())}
    for number, (ours, theirs) in enumerate(zip(own_inputs, whole_inputs, strict=True)):
        ours_grad = ours.grad.clone()
        if kind == "row":
            dist.all_reduce(ours_grad)  # each rank has the gradient of its part alone
        gaps[f"input {number}"] = gap(ours_grad, theirs.grad)
    for name, parameter in own.named_parameters():
        share = share_of(getattr(whole, name).grad, own.param_regions.get(name))
        gaps[name] = gap(parameter.grad, share.view(parameter.shape))
    return gaps


def cut_inputs(kind: str, inputs: list[Tensor], layout: TensorLayout) -> list[Tensor]:
    """What this rank is given of the inputs."""
    if kind == "row":
        return [local_channels(inputs[0], layout)]
    if kind == "skip" and not layout.sequence:
        return [inputs[0], skip_for_sharded_linear(inputs[1], layout)]
    return [scatter_sequence(tensor, layout) for tensor in inputs]


def part_of_output(kind: str, layout: TensorLayout) -> Callable[[Tensor], Tensor]:
    """What this rank has of the output."""
    if kind == "column":
        return lambda out: local_channels(out, layout)
    return lambda out: scatter_sequence(out, layout)


def gap(actual: Tensor, expected: Tensor) -> float:
    size = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return float(((actual - expected).abs() / size).max())


CASES = [(kind, sequence, scaling) for kind in ("column", "row", "skip") for sequence in (False, True)
         for scaling in SCALINGS]  # fmt: skip


def every_layer(fault: bool) -> dict[str, dict[str, float]]:
    return {" ".join(map(str, case)): layer_gaps(*case, fault) for case in CASES}


@pytest.mark.distributed
def test_ranks_multiply_the_fp8_numbers_of_the_whole_layer() -> None:
    for gaps_of_rank in run_ranks(2, every_layer, False):
        for case, gaps_of_case in gaps_of_rank.items():
            assert {name: gap for name, gap in gaps_of_case.items() if not gap < 1e-5} == {}, case


@pytest.mark.distributed
def test_ranks_that_do_not_agree_on_scales_are_seen() -> None:
    """In every case whose scales take values of both ranks."""
    gaps_of_ranks = run_ranks(2, every_layer, True)
    for case in gaps_of_ranks[0]:
        assert max(gap for gaps in gaps_of_ranks for gap in gaps[case].values()) > 1e-3, case
