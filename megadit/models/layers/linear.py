"""Linear layers under muP and tensor parallelism: column-parallel, row-parallel and replicated.

The split follows Megatron-LM (arXiv 1909.08053 section 3; with sequence parallelism 2205.05198 section 4.2). On one
tensor-parallel rank all three are the same plain layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megadit.mup.rules import InitRule, Parametrization, Purpose
from megadit.mup.spec import Dim, ParamSpec
from megadit.parallel.collectives import (
    AsyncCollective,
    concat_tokens,
    copy_to_tensor_parallel_region,
    gather_from_tensor_parallel_region,
    reduce_from_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter_tokens,
)
from megadit.parallel.recompute import is_recomputed
from megadit.parallel.tensor import TensorLayout, mark_shards, shard_shape, tensor_layout
from megadit.slices import ShardRegions
from megadit_kernels import Op, for_autocast
from megadit_kernels.linear import OWN_PRECISION, Axis, LinearProducts


class MuLinear(nn.Module):
    """``y = mult * W x + b``: W (out, in), b (out,); mult is the role's forward multiplier. Base of the layers below.

    Not an ``nn.Linear``, so that the mup package neither rescales it nor asks for its own readout class.

    ``tokens``: T of the input (B, T, n), whose tokens sequence parallelism shards outside of pairs of column-parallel
    and row-parallel layers; None: the input is never sharded. ``products`` computes the layer's GEMMs.
    """

    split: ClassVar[Mapping[str, int]] = {}  # by name of a sharded parameter: the dimension along which it is cut
    sharded_axis: ClassVar[Axis | None] = None  # of its matrices, under tensor parallelism
    per_token = True  # False: applied to one row per image
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_dim: Dim,
        out_dim: Dim,
        param: Parametrization,
        *,
        bias: bool = True,
        init: Purpose | InitRule = "linear",
        tokens: int | None = None,
        parts: int = 1,
        bias_init: Purpose | InitRule = "zero",
    ) -> None:
        """``parts``: matrices side by side along the sharded dimension, sharded one by one (see ``shard_shape``)."""
        super().__init__()
        self.in_features, self.out_features = in_dim.size, out_dim.size
        self.layout = tensor_layout()
        self.tokens = tokens if self.layout.sequence else None
        self.products: LinearProducts = OWN_PRECISION
        self.param_specs: dict[str, ParamSpec] = {"weight": param.spec((out_dim, in_dim), init)}
        if bias:
            self.param_specs["bias"] = param.spec((out_dim,), bias_init)
        self.param_regions: dict[str, ShardRegions] = {}
        for name, spec in self.param_specs.items():
            shape = spec.shape
            if self.layout.size > 1 and name in self.split:
                shape, self.param_regions[name] = shard_shape(shape, self.layout, self.split[name], parts)
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if not bias:
            self.register_parameter("bias", None)
        mark_shards(self)

    @property
    def forward_mult(self) -> float:
        """The multiplier on the layer's input."""
        return self.param_specs["weight"].forward_mult

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), as on one rank."""
        return self.products.linear(x, self.weight, self.bias, self.forward_mult)

    def bias_for_local_tokens(self) -> Tensor | None:
        """The bias for a layer that adds it to this rank's tokens alone: its gradient is summed over the ranks."""
        return None if self.bias is None else copy_to_tensor_parallel_region(self.bias, self.layout)

    def extra_repr(self) -> str:
        spec = self.param_specs["weight"]
        return f"{self.in_features}, {self.out_features}, role={spec.role}, mult={spec.forward_mult:g}"


class ReplicatedLinear(MuLinear):
    """Every rank holds the whole weight; under sequence parallelism it is applied to this rank's tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), of all tokens, or under sequence parallelism of this rank's."""
        if self.tokens is None:
            return super().forward(x)
        weight = copy_to_tensor_parallel_region(self.weight, self.layout)
        return self.products.linear(x, weight, self.bias_for_local_tokens(), self.forward_mult)


class ColumnParallelLinear(MuLinear):
    """A rank holds the rows of W of its share of the outputs, and computes these from the whole input.

    ``gather_output``: the outputs are all-gathered. ``skip_input_grad_reduce``: several layers share this input, and
    ``shared_block_input`` all-reduces the sum of their gradients once.
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}
    sharded_axis: ClassVar[Axis | None] = "out"

    def __init__(
        self,
        in_dim: Dim,
        out_dim: Dim,
        param: Parametrization,
        *,
        bias: bool = True,
        init: Purpose | InitRule = "linear",
        tokens: int | None = None,
        parts: int = 1,
        gather_output: bool = False,
        skip_input_grad_reduce: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, param, bias=bias, init=init, tokens=tokens, parts=parts)
        self.gather_output = gather_output and self.layout.size > 1
        self.reduce_input_grad = self.layout.size > 1 and not skip_input_grad_reduce

    def forward(self, x: Tensor, activation: Op[Any, Tensor] | None = None, **options: Any) -> Tensor:
        """(..., in) -> (..., out / ranks), or with ``gather_output`` (..., out).

        ``activation``: an operation (h, bias, **options) on this rank's outputs. Where it is fused it adds the bias;
        torch's GEMM adds it for nothing. It is called here, where ZeRO-3 has gathered the bias.
        """
        bias: Tensor | None = self.bias
        left = bias if activation is not None and activation.is_fused(x) else None  # what the activation adds
        added = bias if left is None else None
        if self.reduce_input_grad:
            out = column_linear(x, self.weight, added, self.forward_mult, self.layout, self.tokens, self.products)
        else:
            out = self.products.linear(x, self.weight, added, self.forward_mult)
        if activation is not None:
            out = activation(out, left, **options)
        if not self.gather_output:
            return out
        return gather_from_tensor_parallel_region(out, self.layout, partial=self.layout.sequence)


class RowParallelLinear(MuLinear):
    """A rank holds the columns of W of its share of the inputs, the outputs of a column-parallel layer.

    The ranks' products are all-reduced, under sequence parallelism reduce-scattered by tokens; then the bias is added,
    which every rank holds.
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 1}
    sharded_axis: ClassVar[Axis | None] = "in"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in / ranks) -> (..., out), of all tokens, or under sequence parallelism of this rank's."""
        if self.layout.size == 1:
            return super().forward(x)
        product = self.products.linear(x, self.weight, None, self.forward_mult)
        bias: Tensor | None = self.bias
        if self.tokens is None:
            out = reduce_from_tensor_parallel_region(product, self.layout)
        else:
            out = reduce_scatter_to_sequence_parallel_region(product, self.layout)
            bias = self.bias_for_local_tokens()
        return out if bias is None else out + bias


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha: float,
    layout: TensorLayout,
    tokens: int | None,
    products: LinearProducts = OWN_PRECISION,
) -> Tensor:
    """``alpha * (x @ weight.T) + bias`` with this rank's share of the outputs, from the whole input.

    weight (n_out / R, n_in), bias (n_out / R,) or None, on R ranks.
    tokens None: x (..., n_in), the same on all ranks -> (..., n_out / R). x's gradient is all-reduced.
    tokens T: x (B, ceil(T / R), n_in), this rank's tokens, is all-gathered -> (B, T, n_out / R). x's gradient is
    reduce-scattered. The forward pass saves this rank's tokens, and backward gathers all again; a block that is
    recomputed has just gathered them, and saves them all.

    The collectives of the backward pass run while the other gradient is computed (Megatron-LM, arXiv 2205.05198,
    section 4.2.2).
    """
    save_gathered = tokens is not None and is_recomputed()
    operands = for_autocast(x, weight, bias)
    out: Tensor = _ColumnLinear.apply(*operands, alpha, layout, tokens, save_gathered, products)
    return out


class _ColumnLinear(torch.autograd.Function):
    """``column_linear``; ``save_gathered``: backward finds the gathered tokens saved, instead of this rank's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: float,
        layout: TensorLayout,
        tokens: int | None,
        save_gathered: bool,
        products: LinearProducts,
    ) -> Tensor:
        full_x = x if tokens is None else concat_tokens(start_all_gather(x, layout, async_op=False).wait(), tokens)
        out, saved = products.output(full_x, weight, bias, alpha)
        ctx.save_for_backward(full_x if save_gathered else x, weight, *saved)
        ctx.alpha, ctx.layout, ctx.tokens, ctx.products = alpha, layout, tokens, products
        ctx.gather_again = tokens is not None and not save_gathered
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved_x, weight, *saved = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        gradients = ctx.products.gradients(grad_rows, tuple(saved), ctx.alpha)
        gathered = start_all_gather(saved_x, ctx.layout) if ctx.gather_again and need_weight else None
        grad_x: AsyncCollective | None = None
        if need_x:
            reduce = start_all_reduce if ctx.tokens is None else start_reduce_scatter_tokens
            product = gradients.of_input(weight)
            grad_x = reduce(product.view(*grad_out.shape[:-1], -1), ctx.layout)
        grad_weight = grad_bias = None
        if need_weight:
            full_x = saved_x if gathered is None else concat_tokens(gathered.wait(), ctx.tokens)
            grad_weight = gradients.of_weight(full_x.reshape(-1, full_x.shape[-1]))
        if need_bias:
            grad_bias = grad_rows.sum(0)
        return (None if grad_x is None else grad_x.wait()), grad_weight, grad_bias, *(None,) * 5
