"""U-ViT's long skip: the linear on [tokens, skip], which ranks share without gathering either."""

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
from megadit_kernels import for_autocast, scaled_linear


def skip_linear(width: Dim, joined: Dim, param: Parametrization, tokens: int) -> SkipLinear:
    """The long skip of the layout that a model is being built for. ``width``: n; ``joined``: 2n; ``tokens``: T."""
    layout = tensor_layout()
    if layout.size == 1:
        return SkipLinear(joined, width, param)
    if layout.sequence:
        return SequenceParallelSkipLinear(joined, width, param, tokens=tokens)
    return TensorParallelSkipLinear(joined, width, param, parts=2)


def skip_for_sharded_linear(x: Tensor, layout: TensorLayout) -> Tensor:
    """What is carried of x (B, T, n) to a ``SkipLinear``: this rank's channels; without tensor parallelism, or where
    tokens are cut, x itself."""
    return scatter_to_tensor_parallel_region(x, layout) if layout.size > 1 and not layout.sequence else x


class SkipLinear(MuLinear):
    """``mult * W [x, skip] + b``: W (n, 2n), b (n,). Whole on one rank."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]  # of two tensors, not of their join
        """x (B, T, n) and a skip as ``skip_for_sharded_linear`` gave it -> (B, T, n)."""
        return super().forward(torch.cat([x, skip], dim=-1))


class TensorParallelSkipLinear(SkipLinear):
    """A rank holds the weight of a share of the channels: n / ranks of x, and the same of the skip.

    The skip is carried so from where it was made. The ranks' products are summed, and the parts of x's gradient
    gathered. Of W a rank holds two pieces, one after the other: (2, n, n / ranks).
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 1}

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, T, n), skip (B, T, n / ranks) -> (B, T, n)."""
        product: Tensor = _OwnChannels.apply(*for_autocast(x, skip, self.weight), self.forward_mult, self.layout)
        out = reduce_from_tensor_parallel_region(product, self.layout)
        return out if self.bias is None else out + self.bias


class SequenceParallelSkipLinear(SkipLinear):
    """A rank joins its own tokens with the whole of W, of which it holds n / ranks rows and gathers the others.

    They are gathered for each pass: this is (n, 2n) whatever the batch, and the tokens would be (B, T, 2n).
    """

    split: ClassVar[Mapping[str, int]] = {"weight": 0}

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """x and skip: a rank's own (B, ceil(T / ranks), n) -> the same shape."""
        operands = for_autocast(torch.cat([x, skip], dim=-1), self.weight, self.bias_of_own_tokens())
        joined: Tensor = _OwnTokens.apply(*operands, self.forward_mult, self.layout, is_recomputed())
        return joined


class _OwnChannels(torch.autograd.Function):
    """A rank's part of the sum: alpha * (own channels of x @ weight[0].T + skip @ weight[1].T), in one GEMM.

    The gradient of x is gathered while that of the weight is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, weight: Tensor, alpha: float, layout: TensorLayout) -> Tensor:
        joined = torch.cat([local_channels(x, layout), skip], dim=-1)
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
        gathered = start_all_gather(of_x, ctx.layout)
        of_weight = scaled_linear(rows.t(), joined.reshape(-1, joined.shape[-1]).t(), None, ctx.alpha)
        stacked = of_weight.unflatten(1, (2, -1)).transpose(0, 1).contiguous()
        return concat_channels(gathered.wait()), of_skip.contiguous(), stacked, None, None


def _side_by_side(weight: Tensor) -> Tensor:
    """(2, n, k) -> (n, 2k)."""
    return weight.transpose(0, 1).flatten(1)


class _OwnTokens(torch.autograd.Function):
    """alpha * (joined @ W.T) + bias, of whose rows this rank holds ``share``.

    Backward, W is gathered while its gradient is computed, and that is summed while the gradient of the tokens is.
    ``keep``: W stays from the forward pass, which a recomputed block has just made.
    """

    @staticmethod
    def forward(
        ctx: Any, joined: Tensor, share: Tensor, bias: Tensor | None, alpha: float, layout: TensorLayout, keep: bool
    ) -> Tensor:
        weight = start_all_gather(share, layout, async_op=False).wait().flatten(0, 1)
        ctx.save_for_backward(joined, weight if keep else share)
        ctx.alpha, ctx.layout, ctx.keep = alpha, layout, keep
        return scaled_linear(joined, weight, bias, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        joined, held = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        gathered = None if ctx.keep else start_all_gather(held, ctx.layout)
        of_weight = scaled_linear(rows.t(), joined.reshape(-1, joined.shape[-1]).t(), None, ctx.alpha)
        summed = start_reduce_scatter(of_weight, ctx.layout)
        weight = held if gathered is None else gathered.wait().flatten(0, 1)
        of_joined = scaled_linear(rows, weight.t(), None, ctx.alpha).view_as(joined)
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_joined, summed.wait(), of_bias, None, None, None
