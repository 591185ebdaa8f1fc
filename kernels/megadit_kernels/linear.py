"""Linear with a forward multiplier, at no cost: it is the GEMM's ``alpha``, forward and backward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megadit_kernels.registry import Op

Axis = Literal["tokens", "in", "out"]  # of a linear layer's matrices: x (tokens, in), weight (out, in), y (tokens, out)


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
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # which n_in 0 would make ambiguous
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


class LinearProducts:
    """The products of a linear layer in its operands' own precision; subclasses compute them in another.

    Layers that run as a whole call ``linear``. Those that exchange operands or results with other ranks meanwhile call
    ``output``, and in the backward pass ``gradients``.
    """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
        """``scaled_linear``, with its gradients."""
        return scaled_linear(x, weight, bias, alpha)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``scaled_linear``'s value, and small tensors to save for ``gradients``."""
        return scaled_linear(x, weight, bias, alpha), ()

    def gradients(self, grad_rows: Tensor, saved: tuple[Tensor, ...], alpha: float) -> LinearGradients:
        """The gradients for that of the output, (m, n_out). saved: what ``output`` gave to save."""
        return LinearGradients(grad_rows, alpha)


class LinearGradients:
    """Gradients of a linear layer's operands, each computed when it is asked for. grad_rows (m, n_out)."""

    def __init__(self, grad_rows: Tensor, alpha: float) -> None:
        self.grad_rows, self.alpha = grad_rows, alpha

    def of_input(self, weight: Tensor) -> Tensor:
        """weight (n_out, n_in) -> (m, n_in)."""
        return scaled_linear(self.grad_rows, weight.t(), None, self.alpha)

    def of_weight(self, x_rows: Tensor) -> Tensor:
        """x (m, n_in) -> (n_out, n_in)."""
        return scaled_linear(self.grad_rows.t(), x_rows.t(), None, self.alpha)


OWN_PRECISION = LinearProducts()
