"""U-ViT's long skip: the linear on [tokens, skip], in shares without gathering either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadit.models.layers.linear import MuLinear
from megadit.mup.rules import Parametrization
from megadit.mup.spec import Dim
from megadit.parallel.collectives import (
    begin_gather_channels,
    channels_together,
    own_channels,
    scatter_channels,
    sum_over_ranks,
)
from megadit.parallel.tensor import TensorLayout, tensor_layout
from megadit_kernels import for_autocast, scaled_linear


class SkipLinear(MuLinear):
    """``mult * W [x, skip] + b``: W (n, 2n), b (n,).

    Tensor parallelism cuts the input by channels, a rank's n / ranks of x beside the same of the skip, which is carried
    so from where it is ``lent``: ranks' products are summed, and of x's gradient the parts gathered. W's two pieces
    lie one after the other, (2, n, n / ranks). Where sequence parallelism cuts the tokens, a rank joins its own tokens
    with the whole of W, whose gradient is summed. ``width`` n, ``joined`` 2n.
    """

    def __init__(self, width: Dim, joined: Dim, param: Parametrization, *, tokens: int) -> None:
        shard: Any = "none" if tensor_layout().sequence else "row"
        super().__init__(joined, width, param, shard=shard, parts=2, tokens=tokens)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]  # of two tensors, not of their join
        """x (B, T, n) and a skip as ``lend`` gave it -> (B, T, n)."""
        if self.layout is None or self.shard == "none":
            return super().forward(torch.cat([x, skip], dim=-1))
        out = sum_over_ranks(_product(x, skip, self.weight, self.forward_mult, self.layout), self.layout)
        return out if self.bias is None else out + self.bias


def lend(x: Tensor, layout: TensorLayout) -> Tensor:
    """What is carried of x (B, T, n) to a ``SkipLinear``: this rank's channels; without tensor parallelism, or where
    tokens are cut, x itself."""
    return scatter_channels(x, layout) if layout.size > 1 and not layout.sequence else x


def _product(x: Tensor, skip: Tensor, weight: Tensor, alpha: float, layout: TensorLayout) -> Tensor:
    out: Tensor = _OwnChannels.apply(*for_autocast(x, skip, weight), alpha, layout)
    return out


class _OwnChannels(torch.autograd.Function):
    """A rank's part of the sum: alpha * (own channels of x @ weight[0].T + skip @ weight[1].T), in one GEMM.

    The gradient of x is gathered while that of the weight is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, weight: Tensor, alpha: float, layout: TensorLayout) -> Tensor:
        joined = torch.cat([own_channels(x, layout), skip], dim=-1)
        ctx.save_for_backward(joined, weight)
        ctx.alpha, ctx.layout = alpha, layout
        return scaled_linear(joined, _side_by_side(weight), None, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        joined, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        parts = scaled_linear(rows, _side_by_side(weight).t(), None, ctx.alpha)
        of_x, of_skip = parts.view(*joined.shape[:-1], 2, -1).unbind(-2)
        gathered = begin_gather_channels(of_x, ctx.layout)
        of_weight = scaled_linear(rows.t(), joined.reshape(-1, joined.shape[-1]).t(), None, ctx.alpha)
        stacked = of_weight.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
        return channels_together(gathered.wait()), of_skip.contiguous(), stacked, None, None


def _side_by_side(weight: Tensor) -> Tensor:
    """(2, n, k) -> (n, 2k)."""
    return weight.transpose(0, 1).flatten(1)
