"""Bias and GELU in one pass; on a GPU with Triton one kernel in either direction (``fused``)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.registry import Op, triton_runs

Approximation = Literal["tanh", "none"]


@Op
def bias_gelu(h: Tensor, bias: Tensor | None = None, *, approximate: Approximation = "tanh") -> Tensor:
    """``gelu(h + bias)``: h (..., m), bias (m,) or None -> (..., m) in h's dtype.

    Hendrycks and Gimpel, arXiv 1606.08415: x times the normal distribution function of x, or its form with tanh. Fused
    it is computed in float32 and rounded once, and the backward pass computes it again and sums the bias's gradient.
    """
    return F.gelu(h if bias is None else h + bias, approximate=approximate)


bias_gelu.implementation("torch", device=None, works=lambda: True)(bias_gelu.reference)


@bias_gelu.implementation("fused", works=triton_runs)
def _fused(h: Tensor, bias: Tensor | None = None, *, approximate: Approximation = "tanh") -> Tensor:
    from megadit_kernels.gelu.fused import run

    out: Tensor = run(h, bias, approximate)
    return out
