"""Sharded long skips: gradients of the unsharded one, collectives and their order, saved tensors, and elements."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.layouts.tensor_shards import share_of, this_rank
from helpers.models.tiny_uvit import tiny_mup_uvit
from helpers.ranks import run_ranks
from megadit.models import build_model
from megadit.models.build import parametrization
from megadit.models.layers.skip_linear import SkipLinear, skip_for_sharded_linear, skip_linear
from megadit.mup.spec import walk_slices
from megadit.parallel.collectives import CollectiveRecorder, gather_sequence, scatter_sequence
from megadit.parallel.recompute import Recompute, run_block
from megadit.parallel.tensor import TensorLayout, building, shard_shape
from megadit_kernels import linear as products
from megadit_kernels import scaled_linear

BATCH, TOKENS, WIDTH, ALPHA = 2, 5, 64, 0.5
HOW: tuple[Recompute, ...] = ("none", "selective", "full")


def layer(layout: TensorLayout | None) -> SkipLinear:
    param = parametrization(tiny_mup_uvit(WIDTH))
    with building(layout):
        made = skip_linear(param.width_dim(), param.width_dim(2), param, TOKENS)
    return made


def operands() -> list[Tensor]:
    """x, skip, weight, bias, and a gradient of the output; the same on every rank."""
    shapes = ((BATCH, TOKENS, WIDTH), (BATCH, TOKENS, WIDTH), (WIDTH, 2 * WIDTH), (WIDTH,), (BATCH, TOKENS, WIDTH))
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gaps(sequence: bool, alpha: float, recompute: Recompute, autocast: bool = False) -> dict[str, float]:
    """Largest differences of the output, and of all gradients, from those of the unsharded layer."""
    layout = this_rank(sequence)
    x, skip, weight, bias, grad = [part.float() if autocast else part for part in operands()]
    made = layer(layout).to(x.dtype)
    made.param_specs["weight"] = dataclasses.replace(made.param_specs["weight"], forward_mult=alpha)
    shard_regions = made.param_regions["weight"]
    with torch.no_grad():
        made.weight.copy_(share_of(weight, shard_regions).view(made.weight.shape))
        assert made.bias is not None
        made.bias.copy_(bias)
    leaves = [part.clone().requires_grad_() for part in (x, skip)]
    unsharded = [part.clone().requires_grad_() for part in (x, skip, weight, bias)]

    def block(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (made(*tensors),)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        joined = torch.cat(unsharded[:2], dim=-1)
        expected = scaled_linear(joined, unsharded[2], unsharded[3], alpha)
        mine = [scatter_sequence(part, layout) for part in leaves]
        [out] = run_block(block, (mine[0], skip_for_sharded_linear(mine[1], layout)), recompute)
        gathered = gather_sequence(out, layout, TOKENS)
    gathered.backward(grad.to(gathered.dtype))
    expected_grads = torch.autograd.grad(expected, unsharded, grad.to(expected.dtype))
    assert made.weight.grad is not None
    pairs = {
        "out": (gathered, expected),
        "x": (leaves[0].grad, expected_grads[0]),
        "skip": (leaves[1].grad, expected_grads[1]),
        "weight": (made.weight.grad.flatten(), share_of(expected_grads[2], shard_regions)),
        "bias": (made.bias.grad, expected_grads[3]),
    }
    return {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}


def every_layer() -> dict[str, float]:
    cases = [(sequence, alpha, how) for sequence in (False, True) for alpha in (1.0, ALPHA) for how in HOW]
    return {f"{case}: {name}": gap for case in cases for name, gap in gaps(*case).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_have_the_gradients_of_the_whole(ranks: int) -> None:
    for gaps_of_rank in run_ranks(ranks, every_layer):
        assert {name: gap for name, gap in gaps_of_rank.items() if gap > 1e-12} == {}


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
def test_autocast_reaches_both_passes(sequence: bool) -> None:
    for gaps_of_rank in run_ranks(2, gaps, sequence, ALPHA, "none", True):
        assert max(gaps_of_rank.values()) < 0.3  # sums of 128 products, in 8 bits


class Watched:
    """A handle of torch's that says when it was waited for."""

    def __init__(self, name: str, handle: Any, events: list[str]) -> None:
        self.name, self.handle, self.events = name, handle, events

    def wait(self) -> None:
        self.events.append(f"wait for {self.name}")
        self.handle.wait()


def order_of_backward(sequence: bool) -> list[str]:
    """What the backward pass does, one after the other."""
    events: list[str] = []

    def watched(name: str, call: Any) -> Any:
        def begin(*args: Any, async_op: bool = False, **options: Any) -> Any:
            handle = call(*args, async_op=async_op, **options)
            events.append(f"begin {name}" if async_op else name)
            return Watched(name, handle, events) if async_op else None

        return begin

    def product(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        events.append("gradient of the weight" if a.shape[0] == WIDTH else "gradient of the input")
        return scaled_linear(a, b, *rest)

    layout = this_rank(sequence)
    made = layer(layout).double()
    torch.nn.init.zeros_(made.weight)
    x, skip, *_, grad = operands()
    carried = skip_for_sharded_linear(scatter_sequence(skip, layout), layout).detach()
    mine = scatter_sequence(x, layout).requires_grad_(), carried.requires_grad_()
    out = made(*mine)
    with pytest.MonkeyPatch.context() as monkey:
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            monkey.setattr(dist, name, watched(name, getattr(dist, name)))
        monkey.setattr(products, "scaled_linear", product)
        out.backward(scatter_sequence(grad, layout))
    return events


@pytest.mark.distributed
def test_the_gradient_of_x_is_gathered_while_that_of_the_weight_is_computed() -> None:
    assert run_ranks(2, order_of_backward, False)[0] == [
        "gradient of the input",
        "begin all_gather_into_tensor",
        "gradient of the weight",
        "wait for all_gather_into_tensor",
    ]


@pytest.mark.distributed
def test_weights_come_and_their_gradient_goes_while_products_are_computed() -> None:
    assert run_ranks(2, order_of_backward, True)[0] == [
        "begin all_gather_into_tensor",
        "gradient of the weight",
        "begin reduce_scatter_tensor",
        "wait for all_gather_into_tensor",
        "gradient of the input",
        "wait for reduce_scatter_tensor",
        "all_reduce",  # of the bias
    ]


def rehearsed(recompute: Recompute, sequence: bool) -> tuple[Any, Any, Any]:
    """Shapes that a layer of 6 tokens keeps on one of two ranks, and its collectives forward and backward."""
    recorder = CollectiveRecorder()
    layout = TensorLayout(2, 0, sequence, recorder)
    with torch.device("meta"):
        made = layer(layout)
        x = torch.empty(BATCH, 3 if sequence else 6, WIDTH, requires_grad=True)
        skip = skip_for_sharded_linear(torch.empty_like(x, requires_grad=True), layout)
    saved_shapes = []

    def keep(tensor: Tensor) -> Tensor:
        saved_shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        [out] = run_block(lambda tensors: (made(*tensors).sin(),), (x, skip), recompute)
    forward = recorder.pop_calls()
    out.sum().backward()
    return saved_shapes, forward, recorder.pop_calls()


STREAM, WEIGHT, BIAS = (4 * BATCH * 6 * WIDTH, 4 * WIDTH * 2 * WIDTH, 4 * WIDTH)


@pytest.mark.parametrize("how", HOW)
def test_a_rank_exchanges_tokens_or_under_sequence_parallelism_weights(how: Recompute) -> None:
    again = int(how != "none")
    _, forward, backward = rehearsed(how, False)
    assert forward == {("all_reduce", STREAM): 1}
    expected = {("all_gather", STREAM): 2, ("all_reduce", STREAM): again}  # of x, and of what was lent
    assert backward == Counter({key: times for key, times in expected.items() if times})
    _, forward, backward = rehearsed(how, True)
    assert forward == {("all_gather", WEIGHT): 1}
    assert backward == {("all_gather", WEIGHT): 1, ("reduce_scatter", WEIGHT): 1, ("all_reduce", BIAS): 1}


def test_a_rank_keeps_its_share_alone() -> None:
    expected_shapes = {
        False: [(BATCH, 6, WIDTH), (2, WIDTH, WIDTH // 2)],
        True: [(BATCH, 3, 2 * WIDTH), (WIDTH // 2, 2 * WIDTH)],
    }
    for sequence, shapes in expected_shapes.items():
        of_the_sine = (BATCH, 3 if sequence else 6, WIDTH)
        assert Counter(rehearsed("none", sequence)[0]) == Counter([*shapes, of_the_sine])


@pytest.mark.parametrize("sequence", [False, True])
def test_shares_are_the_elements_of_the_whole_and_together_all_of_them(sequence: bool) -> None:
    config = tiny_mup_uvit(WIDTH, mlp_time_embed=True)
    whole = dict(build_model(config, seed=3).named_parameters())
    name = "out_blocks.1.skip_linear.weight"
    elements: list[int] = []
    for rank in range(4):
        for key, p, _, shard_regions in walk_slices(build_model(config, TensorLayout(4, rank, sequence), seed=3)):
            assert torch.equal(p.flatten(), share_of(whole[key], shard_regions)), key
            if key == name:
                assert p.shape == ((WIDTH // 4, 2 * WIDTH) if sequence else (2, WIDTH, WIDTH // 4))
                numbers = torch.arange(whole[name].numel()).view(whole[name].shape)
                elements += share_of(numbers, shard_regions).tolist()
    assert sorted(elements) == list(range(2 * WIDTH**2))


def test_parts_along_a_later_dimension_are_stacked() -> None:
    shape, shard_regions = shard_shape((3, 8), TensorLayout(2, 1), 1, 2)
    assert shape == (2, 3, 2) and shard_regions == (((0, 3), (2, 4)), ((0, 3), (6, 8)))
