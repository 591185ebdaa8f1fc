"""The product of a column layer, whose backward pass computes while the ranks exchange."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadit.parallel.collectives import (
    Pending,
    begin_gather_tokens,
    begin_sum,
    begin_sum_and_scatter_tokens,
    tokens_together,
)
from megadit.parallel.recompute import is_recomputed
from megadit.parallel.tensor import TensorLayout
from megadit_kernels import for_autocast, scaled_linear


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
        whole = x if tokens is None else tokens_together(begin_gather_tokens(x, layout, later=False).wait(), tokens)
        ctx.save_for_backward(whole if keep else x, weight)
        ctx.alpha, ctx.layout, ctx.tokens, ctx.gathers = alpha, layout, tokens, tokens is not None and not keep
        return scaled_linear(whole, weight, bias, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])
        gathered = begin_gather_tokens(x, ctx.layout) if ctx.gathers and need_weight else None
        summed: Pending | None = None
        if need_x:
            begin = begin_sum if ctx.tokens is None else begin_sum_and_scatter_tokens
            summed = begin(scaled_linear(rows, weight.t(), None, ctx.alpha).view(*grad.shape[:-1], -1), ctx.layout)
        grad_weight = grad_bias = None
        if need_weight:
            whole = x if gathered is None else tokens_together(gathered.wait(), ctx.tokens)
            grad_weight = scaled_linear(rows.t(), whole.reshape(-1, whole.shape[-1]).t(), None, ctx.alpha)
        if need_bias:
            grad_bias = rows.sum(0)
        return (None if summed is None else summed.wait()), grad_weight, grad_bias, None, None, None, None
