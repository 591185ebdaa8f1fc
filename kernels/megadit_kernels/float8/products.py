"""The three GEMMs of a linear layer in FP8, whole or of one tensor-parallel rank's share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadit_kernels.float8.quantize import Float8Matrix, Scaling, largest_magnitude, multiply, quantize
from megadit_kernels.linear import Axis, LinearGradients, LinearProducts, scaled_linear
from megadit_kernels.registry import for_autocast

_OPERAND = torch.float8_e4m3fn


@dataclass(frozen=True)
class Float8Products(LinearProducts):
    """``LinearProducts`` in FP8.

    sharded: axes of which other ranks hold the rest: ``in`` or ``out`` channels, or ``tokens``.  agree: elementwise
    maximum of a float32 vector over these ranks. Where a scale's values lie on several ranks they agree on it, so that
    they multiply the same FP8 numbers as one rank would.
    """

    scaling: Scaling = "tensor"
    sharded: frozenset[Axis] = frozenset()
    agree: Callable[[Tensor], Tensor] | None = None

    @property
    def grad_dtype(self) -> torch.dtype:
        """FP8 type of the output's gradient."""
        return torch.float8_e5m2 if self.scaling == "tensor" else torch.float8_e4m3fn

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
        """See ``LinearProducts.linear``."""
        out: Tensor = _Float8Linear.apply(*for_autocast(x, weight, bias), alpha, self)
        return out

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See ``LinearProducts.output``; saved are the magnitudes of x and weight, where backward's are the same."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return scaled_linear(x, weight, bias, alpha), ()
        amax_x, amax_w = self.magnitudes([(rows, ("tokens", "in")), (weight, ("out", "in"))], "in")
        a, b = quantize(rows, amax_x, _OPERAND), quantize(weight, amax_w, _OPERAND)
        out = multiply(a, b, x.dtype, alpha=alpha, bias=bias)
        return out.view(*x.shape[:-1], -1), (amax_x, amax_w) if self.scaling == "tensor" else ()

    def gradients(self, grad_rows: Tensor, saved: tuple[Tensor, ...], alpha: float) -> LinearGradients:
        """See ``LinearProducts.gradients``."""
        if grad_rows.shape[0] == 0:
            return super().gradients(grad_rows, saved, alpha)
        return Float8Gradients(self, grad_rows, saved, alpha)

    def magnitudes(self, operands: list[tuple[Tensor, tuple[Axis, Axis]]], contracted: Axis) -> list[Tensor]:
        """``largest_magnitude`` of each matrix (rows, k), k being ``contracted``, with the axes of its two dimensions;
        agreed on in one exchange where it takes values of other ranks."""
        amaxes = [largest_magnitude(matrix, self.scaling) for matrix, _ in operands]
        shared = [
            index
            for index, (_, axes) in enumerate(operands)
            if self.sharded.intersection(axes if self.scaling == "tensor" else (contracted,))
        ]
        if shared and self.agree is not None:
            agreed = self.agree(torch.cat([amaxes[index].reshape(-1) for index in shared]))
            parts = agreed.split([amaxes[index].numel() for index in shared])
            for index, part in zip(shared, parts, strict=True):
                amaxes[index] = part.view(amaxes[index].shape)
        return amaxes


class Float8Gradients(LinearGradients):
    """``LinearGradients`` in FP8. With one scale per matrix the gradient of the output is quantised once for both."""

    def __init__(self, products: Float8Products, grad_rows: Tensor, saved: tuple[Tensor, ...], alpha: float) -> None:
        super().__init__(grad_rows, alpha)
        self.products = products
        amaxes: tuple[Tensor | None, ...] = saved or (None, None)
        self.amax_x, self.amax_w = amaxes
        self._quantized: Float8Matrix | None = None
        if products.scaling == "tensor":
            [amax] = products.magnitudes([(grad_rows, ("tokens", "out"))], "out")
            self._quantized = quantize(grad_rows, amax, products.grad_dtype)

    def of_input(self, weight: Tensor) -> Tensor:
        """grad (m, n_out), weight (n_out, n_in) -> (m, n_in)."""
        grad, matrix = self.grad_rows, weight.t()
        if self._quantized is not None and self.amax_w is not None:
            a, b = self._quantized, quantize(matrix, self.amax_w, _OPERAND)
        else:
            amaxes = self.products.magnitudes([(grad, ("tokens", "out")), (matrix, ("in", "out"))], "out")
            a, b = quantize(grad, amaxes[0], self.products.grad_dtype), quantize(matrix, amaxes[1], _OPERAND)
        return multiply(a, b, weight.dtype, alpha=self.alpha)

    def of_weight(self, x_rows: Tensor) -> Tensor:
        """grad (m, n_out), x (m, n_in) -> (n_out, n_in)."""
        grad, matrix = self.grad_rows.t(), x_rows.t()
        if self._quantized is not None and self.amax_x is not None:
            a, b = self._quantized.transposed(), quantize(matrix, self.amax_x, _OPERAND)
        else:
            amaxes = self.products.magnitudes([(grad, ("out", "tokens")), (matrix, ("in", "tokens"))], "tokens")
            a, b = quantize(grad, amaxes[0], self.products.grad_dtype), quantize(matrix, amaxes[1], _OPERAND)
        return multiply(a, b, x_rows.dtype, alpha=self.alpha)


class _Float8Linear(torch.autograd.Function):
    """``Float8Products.linear``. Saved are x and weight as they came: under ZeRO 3 the weight's copy would stay."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, products: Float8Products
    ) -> Tensor:
        out, saved = products.output(x, weight, bias, alpha)
        ctx.save_for_backward(x, weight, *saved)
        ctx.alpha, ctx.products = alpha, products
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_rows = grad_out.reshape(-1, grad_out.shape[-1])
        gradients = ctx.products.gradients(grad_rows, tuple(saved), ctx.alpha)
        grad_x = gradients.of_input(weight).view(x.shape) if need_x else None
        grad_weight = gradients.of_weight(x.reshape(-1, x.shape[-1])) if need_weight else None
        return grad_x, grad_weight, grad_rows.sum(0) if need_bias else None, None, None
