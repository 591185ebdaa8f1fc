"""U-ViT's long skip: ``y = mult * W [x, skip] + b``, a linear on tokens joined with those of an earlier block.

W (n, 2n) has columns for x and columns for the skip, W = [W_x W_s]. With R = 2 ranks each holds half of W, and no rank
gathers x and skip joined, (B, T, 2n):

    TensorParallelSkipLinear                           SequenceParallelSkipLinear
    x on all ranks, skip cut by channels               x and skip cut by tokens

                 W_x       W_s                                      W_x       W_s
               +----+----+----+----+                              +---------+---------+
      n rows   | 0  | 1  | 0  | 1  |                     n/2 rows |    0    |    0    |
               +----+----+----+----+                              +---------+---------+
                 n/2 columns each                        n/2 rows |    1    |    1    |
                                                                  +---------+---------+
    rank r computes W_x[r] x[r] + W_s[r] skip[r]       every rank all-gathers W and computes its tokens
    all-reduce of y; backward: all-gather of dx        backward: reduce-scatter of dW
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadit.models.layers.linear import MuLinear
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.collectives import (
    concat_channels,
    local_channels,
    reduce_from_tensor_parallel_region,
    scatter_to_tensor_parallel_region,
    start_all_gather,
    start_reduce_scatter,
)
from megadit.parallel.recompute import is_recomputed
from megadit.parallel.tensor import TensorLayout, tensor_layout
from megadit_kernels import for_autocast
from megadit_kernels.linear import Axis, LinearProducts


def skip_linear(width: Dim, joined: Dim, param: Parametrization, tokens: int) -> SkipLinear:
    """The long skip of the layout that a model is being built for. ``width``: n; ``joined``: 2n; ``tokens``: T."""
    layout = tensor_layout()
    if layout.size == 1:
        return SkipLinear(joined, width, param)
    if layout.sequence:
        return SequenceParallelSkipLinear(joined, width, param, tokens=tokens)
    return TensorParallelSkipLinear(joined, width, param, parts=2)


def skip_for_sharded_linear(x: Tensor, layout: TensorLayout) -> Tensor:
    """The shard of x (B, T, n) that is stored for a later ``SkipLinear``: under tensor parallelism this rank's channels
    (B, T, n / R); on one rank, and under sequence parallelism, whose x is cut already, x itself."""
    return scatter_to_tensor_parallel_region(x, layout) if layout.size > 1 and not layout.sequence else x


class SkipLinear(MuLinear):
    """``mult * W [x, skip] + b``: W (n, 2n), b (n,), on one rank."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]  # of two tensors, not of their join
        """x (B, T, n) and a skip of ``skip_for_sharded_linear`` -> (B, T, n)."""
        return super().forward(torch.cat([x, skip], dim=-1))


class TensorParallelSkipLinear(SkipLinear):
    """A rank holds the columns of its channels of x and of the skip, as two matrices: (2, n, n / R). See the module."""

    split: ClassVar[Mapping[str, int]] = {"weight": 1}
    sharded_axis: ClassVar[Axis | None] = "in"

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, T, n), the same on all ranks, and this rank's skip (B, T, n / R) -> (B, T, n)."""
        operands = for_autocast(x, skip, self.weight)
        product: Tensor = _LocalChannelsProduct.apply(*operands, self.forward_mult, self.layout, self.products)
        out = reduce_from_tensor_parallel_region(product, self.layout)
        return out if self.bias is None else out + self.bias


class SequenceParallelSkipLinear(SkipLinear):
    """A rank holds n / R rows of W, gathers the others for each pass, and applies W to its own tokens.

    W is (n, 2n) whatever the batch; gathering the tokens instead would take (B, T, 2n).
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 0}
    sharded_axis: ClassVar[Axis | None] = "tokens"

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """x and skip of this rank's tokens, (B, ceil(T / R), n) each -> the same shape."""
        operands = for_autocast(torch.cat([x, skip], dim=-1), self.weight, self.bias_for_local_tokens())
        out: Tensor = _GatheredWeightLinear.apply(
            *operands, self.forward_mult, self.layout, is_recomputed(), self.products
        )
        return out


class _LocalChannelsProduct(torch.autograd.Function):
    """This rank's term of the sum over ranks, ``alpha * (x[r] @ W_x[r].T + skip[r] @ W_s[r].T)``, in one GEMM.

    x (B, T, n) is the same on all ranks, and so is its gradient, whose channels are gathered while that of the weight
    is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor,
        weight: Tensor,
        alpha: float,
        layout: TensorLayout,
        products: LinearProducts,
    ) -> Tensor:
        joined = torch.cat([local_channels(x, layout), skip], dim=-1)
        out, saved = products.output(joined, _as_one_matrix(weight), None, alpha)
        ctx.save_for_backward(joined, weight, *saved)
        ctx.alpha, ctx.layout, ctx.products = alpha, layout, products
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        joined, weight, *saved = ctx.saved_tensors
        gradients = ctx.products.gradients(grad_out.reshape(-1, grad_out.shape[-1]), tuple(saved), ctx.alpha)
        grad_joined = gradients.of_input(_as_one_matrix(weight))
        grad_local_x, grad_skip = grad_joined.view(*joined.shape[:-1], 2, -1).unbind(-2)
        grad_x = start_all_gather(grad_local_x, ctx.layout)
        grad_matrix = gradients.of_weight(joined.reshape(-1, joined.shape[-1]))
        grad_weight = grad_matrix.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
        return concat_channels(grad_x.wait()), grad_skip.contiguous(), grad_weight, None, None, None


def _as_one_matrix(weight: Tensor) -> Tensor:
    """[W_x[r] W_s[r]]: (2, n, n / R) -> (n, 2n / R)."""
    return weight.transpose(0, 1).flatten(1)


class _GatheredWeightLinear(torch.autograd.Function):
    """``alpha * (joined @ W.T) + bias`` of this rank's tokens; ``weight_shard`` (n / R, 2n) holds its rows of W.

    Backward, W is gathered while its gradient is computed, and that is reduce-scattered while the gradient of the
    tokens is computed. ``keep_weight``: the gathered W is saved from the forward pass, instead of gathered again; a
    block that is recomputed has just gathered it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        joined: Tensor,
        weight_shard: Tensor,
        bias: Tensor | None,
        alpha: float,
        layout: TensorLayout,
        keep_weight: bool,
        products: LinearProducts,
    ) -> Tensor:
        weight = start_all_gather(weight_shard, layout, async_op=False).wait().flatten(0, 1)
        out, saved = products.output(joined, weight, bias, alpha)
        ctx.save_for_backward(joined, weight if keep_weight else weight_shard, *saved)
        ctx.alpha, ctx.layout, ctx.keep_weight, ctx.products = alpha, layout, keep_weight, products
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        joined, saved_weight, *saved = ctx.saved_tensors
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        gradients = ctx.products.gradients(grad_rows, tuple(saved), ctx.alpha)
        gathered = None if ctx.keep_weight else start_all_gather(saved_weight, ctx.layout)
        grad_weight = gradients.of_weight(joined.reshape(-1, joined.shape[-1]))
        grad_shard = start_reduce_scatter(grad_weight, ctx.layout)
        weight = saved_weight if gathered is None else gathered.wait().flatten(0, 1)
        grad_joined = gradients.of_input(weight).view_as(joined)
        grad_bias = grad_rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_joined, grad_shard.wait(), grad_bias, None, None, None, None
