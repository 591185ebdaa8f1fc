"""Linear with a forward multiplier, at no cost: it is the GEMM's ``alpha``, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megadit_kernels.registry import Op


@Op
def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """``alpha * (x @ weight.T) + bias``.

    x (..., n_in), weight (n_out, n_in), bias (n_out,) or None -> (..., n_out), all of one dtype. With alpha 1 every
    implementation is ``F.linear``.
    """
    return F.linear(alpha * x, weight, bias)


@scaled_linear.implementation("torch", device=None, works=lambda: True)
def _in_the_gemm(x: Tensor, weight: Tensor, bias: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Without a separate pass over x; with alpha 1 it is ``F.linear``, bit for bit."""
    if alpha == 1.0:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        # Autocast casts operands of torch's own ops only: the backward of ``_ScaledLinear`` would get mixed types.
        out = _gemm(rows, weight.t(), bias, alpha)
    else:
        out = _ScaledLinear.apply(rows, weight, bias, alpha)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _gemm(a: Tensor, b: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
    """alpha * (a @ b) + bias in one GEMM call; with beta 0 addmm ignores its first operand."""
    if bias is None:
        return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=alpha)
    return torch.addmm(bias, a, b, alpha=alpha)


class _ScaledLinear(torch.autograd.Function):
    """autograd's addmm would scale the gradient of x in a second pass; here alpha is an argument of both GEMMs."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.alpha = alpha
        return _gemm(rows, weight.t(), bias, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        need_rows, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_rows = _gemm(grad, weight, None, ctx.alpha) if need_rows else None
        grad_weight = _gemm(grad.t(), rows, None, ctx.alpha) if need_weight else None
        return grad_rows, grad_weight, grad.sum(0) if need_bias else None, None
