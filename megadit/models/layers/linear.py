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
from megadit_kernels import for_autocast, scaled_linear


class MuLinear(nn.Module):
    """``y = mult * W x + b``: W (out, in), b (out,); mult is the role's forward multiplier. Whole on one rank.

    Not an ``nn.Linear``, so that the mup package neither rescales it nor asks for its own readout class.

    ``tokens``: the input (B, T, n) is a stream of T tokens, which sequence parallelism cuts between the ranks outside
    of pairs of column and row layers; None: it is never cut.
    """

    split: ClassVar[Mapping[str, int]] = {}  # of a parameter that ranks share, the dimension along which it is cut
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
        return scaled_linear(x, self.weight, self.bias, self.forward_mult)

    def bias_of_own_tokens(self) -> Tensor | None:
        """The bias where each rank adds it to its own tokens, so that its gradient is a sum over ranks."""
        return None if self.bias is None else copy_to_tensor_parallel_region(self.bias, self.layout)

    def extra_repr(self) -> str:
        spec = self.param_specs["weight"]
        return f"{self.in_features}, {self.out_features}, role={spec.role}, mult={spec.forward_mult:g}"


class ReplicatedLinear(MuLinear):
    """Every rank holds all of the weight; under sequence parallelism it sees its own tokens alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), of all tokens or of a rank's own."""
        if self.tokens is None:
            return super().forward(x)
        weight = copy_to_tensor_parallel_region(self.weight, self.layout)
        return scaled_linear(x, weight, self.bias_of_own_tokens(), self.forward_mult)


class ColumnParallelLinear(MuLinear):
    """A rank holds a share of the outputs, and computes it from the whole input.

    ``gather_output``: every rank gets all outputs, to use on what it holds of the tokens. ``skip_input_grad_reduce``:
    several layers have this input, and ``shared_block_input`` sums its gradient for all of them.
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0}

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

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out / ranks), or with ``gather_output`` (..., out)."""
        if self.reduce_input_grad:
            out = column_linear(x, self.weight, self.bias, self.forward_mult, self.layout, self.tokens)
        else:
            out = super().forward(x)
        return (
            gather_from_tensor_parallel_region(out, self.layout, partial=self.layout.sequence)
            if self.gather_output
            else out
        )


class RowParallelLinear(MuLinear):
    """A rank holds the weight of a share of the inputs, which a column-parallel layer left it with.

    The ranks' products are summed, then the bias is added, which every rank holds.
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 1}

    def forward(self, x: Tensor) -> Tensor:
        """(..., in / ranks) -> (..., out), of all tokens or of a rank's own."""
        if self.layout.size == 1:
            return super().forward(x)
        product = scaled_linear(x, self.weight, None, self.forward_mult)
        sequence = self.tokens is not None
        out = (
            reduce_scatter_to_sequence_parallel_region(product, self.layout)
            if sequence
            else reduce_from_tensor_parallel_region(product, self.layout)
        )
        bias = self.bias_of_own_tokens() if sequence else self.bias
        return out if bias is None else out + bias


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, layout: TensorLayout, tokens: int | None
) -> Tensor:
    """``alpha * (x @ weight.T) + bias`` with this rank's share of the outputs, from the whole input.

    weight (n_out / ranks, n_in), bias (n_out / ranks,) or None. x (..., n_in), the same on all ranks, or with
    ``tokens`` T a rank's own tokens (B, ceil(T / ranks), n_in) -> (..., n_out / ranks) or (B, T, n_out / ranks). The
    ranks' gradients of x are summed, and with ``tokens`` scattered, while the gradient of the weight is computed
    (Megatron-LM, arXiv 2205.05198 section 4.2.2). With ``tokens`` the own tokens alone are kept for it, and gathered
    once more while the gradient of x is computed; a block that is recomputed has just gathered them, and keeps them.
    """
    keep = tokens is not None and is_recomputed()
    out: Tensor = _ColumnLinear.apply(*for_autocast(x, weight, bias), alpha, layout, tokens, keep)
    return out


class _ColumnLinear(torch.autograd.Function):
    """``keep``: whether the gathered tokens are kept for the backward pass, instead of a rank's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        alpha: float,
        layout: TensorLayout,
        tokens: int | None,
        keep: bool,
    ) -> Tensor:
        whole = x if tokens is None else concat_tokens(start_all_gather(x, layout, async_op=False).wait(), tokens)
        ctx.save_for_backward(whole if keep else x, weight)
        ctx.alpha, ctx.layout, ctx.tokens, ctx.gathers = alpha, layout, tokens, tokens is not None and not keep
        return scaled_linear(whole, weight, bias, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        gathered = start_all_gather(x, ctx.layout) if ctx.gathers and need_weight else None
        summed: AsyncCollective | None = None
        if need_x:
            begin = start_all_reduce if ctx.tokens is None else start_reduce_scatter_tokens
            summed = begin(scaled_linear(rows, weight.t(), None, ctx.alpha).view(*grad.shape[:-1], -1), ctx.layout)
        grad_weight = grad_bias = None
        if need_weight:
            whole = x if gathered is None else concat_tokens(gathered.wait(), ctx.tokens)
            grad_weight = scaled_linear(rows.t(), whole.reshape(-1, whole.shape[-1]).t(), None, ctx.alpha)
        if need_bias:
            grad_bias = rows.sum(0)
        return (None if summed is None else summed.wait()), grad_weight, grad_bias, None, None, None, None
