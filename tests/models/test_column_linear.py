"""Column layers compute while their ranks exchange: the order of it, what they keep, and the same numbers as whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helpers.layouts.tensor_shards import this_rank
from helpers.ranks import run_ranks
from megadit.models.layers.linear import column_linear
from megadit.parallel.collectives import CollectiveRecorder, scatter_sequence
from megadit.parallel.recompute import Recompute, run_block
from megadit.parallel.tensor import TensorLayout
from megadit_kernels import linear as products
from megadit_kernels import scaled_linear

BATCH, WIDTH, OUT, ALPHA = 2, 6, 4, 0.5  # OUT: a rank's share


def operands(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight and bias of all ranks, and a gradient of the whole output; the same on every rank."""
    ranks = dist.get_world_size()
    shapes = ((BATCH, tokens, WIDTH), (ranks * OUT, WIDTH), (ranks * OUT,), (BATCH, tokens, ranks * OUT))
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), grad.to(dtype)


def layer_gaps(tokens: int, sequence: bool, alpha: float, autocast: bool = False) -> dict[str, float]:
    """Largest differences of the output, and of the gradients of x, weight and bias, from the whole layer's."""
    layout = this_rank(sequence)
    x, weight, bias, grad = operands(tokens, torch.float32 if autocast else torch.float64)
    share = slice(layout.rank * OUT, (layout.rank + 1) * OUT)
    whole_x, whole_weight, whole_bias = (part.clone().requires_grad_() for part in (x, weight, bias))
    own_x, own_weight, own_bias = (part.clone().requires_grad_() for part in (x, weight[share], bias[share]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = scaled_linear(whole_x, whole_weight, whole_bias, alpha)
        tokens_cut = tokens if sequence else None
        out = column_linear(scatter_sequence(own_x, layout), own_weight, own_bias, alpha, layout, tokens_cut)
    assert out.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float64)
    expected_grads = torch.autograd.grad(expected, (whole_x, whole_weight, whole_bias), grad.to(expected.dtype))
    grads = torch.autograd.grad(out, (own_x, own_weight, own_bias), grad[..., share].to(out.dtype))
    pairs = {
        "out": (out, expected[..., share]),
        "x": (grads[0], expected_grads[0]),
        "weight": (grads[1], expected_grads[1][share]),
        "bias": (grads[2], expected_grads[2][share]),
    }
    assert all(ours.dtype == theirs.dtype for ours, theirs in pairs.values())
    return {name: float((ours - theirs).abs().max()) for name, (ours, theirs) in pairs.items()}


@pytest.mark.distributed
def test_column_layers_have_the_gradients_of_whole_ones() -> None:
    for gaps_of_rank in run_ranks(2, every_layer):
        assert {name: gap for name, gap in gaps_of_rank.items() if gap > 1e-13} == {}


def every_layer() -> dict[str, float]:
    """Tokens that the ranks divide and do not, multipliers of 1 and not."""
    cases = [(t, sequence, alpha) for t in (4, 5) for sequence in (False, True) for alpha in (1.0, ALPHA)]
    return {f"{case}: {name}": gap for case in cases for name, gap in layer_gaps(*case).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
def test_autocast_reaches_both_passes(sequence: bool) -> None:
    for gaps_of_rank in run_ranks(2, layer_gaps, 4, sequence, ALPHA, True):
        assert max(gaps_of_rank.values()) < 0.1  # bfloat16 has 8 bits


class Watched:
    """A handle of torch's that says when it was waited for."""

    def __init__(self, name: str, handle: Any, events: list[str]) -> None:
        self.name, self.handle, self.events = name, handle, events

    def wait(self) -> None:
        self.events.append(f"wait for {self.name}")
        self.handle.wait()


def order_of_backward(sequence: bool) -> list[str]:
    """What the backward pass of a column layer does, one after the other."""
    events: list[str] = []

    def watched(name: str, call: Any) -> Any:
        def begin(*args: Any, async_op: bool = False, **options: Any) -> Any:
            handle = call(*args, async_op=async_op, **options)
            events.append(f"begin {name}" if async_op else name)
            return Watched(name, handle, events) if async_op else None

        return begin

    def product(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        events.append("gradient of the weight" if a.shape[0] == OUT else "gradient of x")
        return scaled_linear(a, b, *rest)

    layout = this_rank(sequence)
    x, weight, bias, grad = operands(5)
    leaf = scatter_sequence(x, layout).requires_grad_()
    out = column_linear(
        leaf, weight[:OUT].requires_grad_(), bias[:OUT].requires_grad_(), ALPHA, layout, 5 if sequence else None
    )
    with pytest.MonkeyPatch.context() as monkey:
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            monkey.setattr(dist, name, watched(name, getattr(dist, name)))
        monkey.setattr(products, "scaled_linear", product)
        out.backward(grad[..., :OUT])
    return events


@pytest.mark.distributed
def test_the_weights_gradient_is_computed_while_gradients_of_the_input_are_summed() -> None:
    assert run_ranks(2, order_of_backward, False)[0] == [
        "gradient of x",
        "begin all_reduce",
        "gradient of the weight",
        "wait for all_reduce",
    ]


@pytest.mark.distributed
def test_tokens_are_gathered_while_the_gradient_of_the_input_is_computed() -> None:
    assert run_ranks(2, order_of_backward, True)[0] == [
        "begin all_gather_into_tensor",
        "gradient of x",
        "begin reduce_scatter_tensor",
        "wait for all_gather_into_tensor",
        "gradient of the weight",
        "wait for reduce_scatter_tensor",
    ]


def rehearsed(recompute: Recompute, *, train_weight: bool = True, train_x: bool = True) -> tuple[Any, Any, Any]:
    """Shapes that a sequence-parallel column layer of 6 tokens keeps, and its collectives forward and backward."""
    recorder = CollectiveRecorder()
    layout = TensorLayout(2, 0, True, recorder)
    weight = torch.empty(OUT, WIDTH, device="meta", requires_grad=train_weight)
    x = torch.empty(BATCH, 3, WIDTH, device="meta", requires_grad=train_x)
    saved_shapes = []

    def keep(tensor: Tensor) -> Tensor:
        saved_shapes.append(tuple(tensor.shape))
        return tensor

    def block(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (column_linear(tensors[0], weight, None, ALPHA, layout, 6).sin(),)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        [out] = run_block(block, (x,), recompute)
    forward = recorder.pop_calls()
    out.sum().backward()
    return saved_shapes, forward, recorder.pop_calls()


GATHER, SCATTER = ("all_gather", BATCH * 6 * WIDTH * 4), ("reduce_scatter", BATCH * 6 * WIDTH * 4)


def test_a_rank_keeps_its_own_tokens_alone() -> None:
    saved_shapes, forward, backward = rehearsed("none")
    assert Counter(saved_shapes) == Counter([(BATCH, 3, WIDTH), (OUT, WIDTH), (BATCH, 6, OUT)])  # the last: of the sine
    assert forward == {GATHER: 1}
    assert backward == {GATHER: 1, SCATTER: 1}


@pytest.mark.parametrize("how", ["selective", "full"])
def test_a_recomputed_block_gathers_its_tokens_once_more_and_not_twice(how: Recompute) -> None:
    _, forward, backward = rehearsed(how)
    assert forward == {GATHER: 1}
    assert backward == {GATHER: 1, SCATTER: 1}


def test_what_needs_no_gradient_costs_no_collective() -> None:
    assert rehearsed("none", train_weight=False)[2] == {SCATTER: 1}
    assert rehearsed("none", train_x=False)[2] == {GATHER: 1}
