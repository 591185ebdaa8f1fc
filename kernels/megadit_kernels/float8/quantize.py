"""Matrices in FP8 with one scale per matrix or per row, and their product.

A scale is a power of two, so that dividing by it is exact and a value is rounded to the same FP8 number whatever the
rest of its matrix is, unless it falls among the subnormal ones (Micikevicius et al., arXiv 2209.05433, and torchao's
row-wise recipe). It costs at most one of the 15 (e4m3) or 31 (e5m2) binades of range.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Scaling = Literal["tensor", "row"]

_MULTIPLE = 16  # tensor cores take FP8 matrices in multiples of 16 bytes
_SMALLEST = 2.0**-80  # of a largest magnitude: the product of two scales stays a normal float32 number
_EXPONENT, _MANTISSA = 0x7F800000, 0x007FFFFF  # of the bits of a positive float32 number


class Float8Matrix(NamedTuple):
    """``scale * values``: values (rows, k) in FP8, contiguous; scale float32, () or (rows, 1)."""

    values: Tensor
    scale: Tensor

    def transposed(self) -> Float8Matrix:
        """(k, rows), of a matrix with one scale."""
        return Float8Matrix(self.values.t().clone(memory_format=torch.contiguous_format), self.scale)


def largest_magnitude(matrix: Tensor, scaling: Scaling) -> Tensor:
    """Largest magnitude of a matrix (rows, k), or of each of its rows: float32, () or (rows, 1). NaN where one is."""
    low, high = torch.aminmax(matrix) if scaling == "tensor" else torch.aminmax(matrix, dim=1, keepdim=True)
    return torch.maximum(-low, high).float()


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest power of two by which ``amax`` is divided to fit into ``dtype``. NaN where amax is not finite."""
    fitted = amax.clamp(min=_SMALLEST) * (1.0 / torch.finfo(dtype).max)
    power = ((fitted.view(torch.int32) + _MANTISSA) & _EXPONENT).view(torch.float32)
    return power + (amax - amax)


def quantize(matrix: Tensor, amax: Tensor, dtype: torch.dtype) -> Float8Matrix:
    """A matrix (rows, k), which may be a transposed view, in FP8 ``dtype``; amax: of ``largest_magnitude``."""
    scale = scale_of(amax, dtype)
    inverse = scale.reciprocal()
    if matrix.dtype == torch.bfloat16:  # which has the exponents of float32: exact too, with half the bytes
        scaled = matrix * inverse.to(torch.bfloat16)
    else:
        scaled = matrix.float() * inverse
    return Float8Matrix(scaled.to(dtype, memory_format=torch.contiguous_format), scale)


def multiply(
    a: Float8Matrix, b: Float8Matrix, out_dtype: torch.dtype, *, alpha: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """``alpha * a @ b.T + bias``: a (m, k), b (n, k), bias (n,) -> (m, n), summed in float32.

    alpha is multiplied into the scales of b. Where 16 does not divide k or n, zeros are added, which is exact.
    """
    scale_b = b.scale if alpha == 1.0 else b.scale * alpha
    if a.values.device.type == "cpu":
        return _multiply_on_cpu(a, Float8Matrix(b.values, scale_b), out_dtype, bias)
    return scaled_mm(a, Float8Matrix(b.values, scale_b), out_dtype, bias)


def scaled_mm(a: Float8Matrix, b: Float8Matrix, out_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias`` by ``torch._scaled_mm``, operands padded to multiples of 16."""
    n, k = b.values.shape
    more_k, more_n = -k % _MULTIPLE, -n % _MULTIPLE
    values_a, (values_b, scale_b) = a.values, b
    if more_k:
        values_a = _pad(values_a, more_k, 0)
    if more_k or more_n:
        values_b = _pad(values_b, more_k, more_n)
    if more_n:
        scale_b = scale_b if scale_b.dim() == 0 else F.pad(scale_b, (0, 0, 0, more_n))
        bias = None if bias is None else F.pad(bias, (0, more_n))
    out: Tensor = torch._scaled_mm(
        values_a,
        values_b.t(),
        scale_a=a.scale,
        scale_b=scale_b.t(),
        bias=bias,
        out_dtype=out_dtype,
        use_fast_accum=False,  # it sums in less than float32
    )
    return out.narrow(1, 0, n).clone(memory_format=torch.contiguous_format) if more_n else out


def _pad(values: Tensor, columns: int, rows: int) -> Tensor:
    """Zeros to the right and below; as bytes, which every device can pad."""
    return F.pad(values.view(torch.uint8), (0, columns, 0, rows)).view(values.dtype)


def _multiply_on_cpu(a: Float8Matrix, b: Float8Matrix, out_dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """The same products, summed in float32 by a float32 GEMM: torch's FP8 GEMM on a CPU is a loop without vectors."""
    out = (a.values.float() @ b.values.float().t()) * a.scale * b.scale.t()
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)
