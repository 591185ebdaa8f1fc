"""SwiGLU's product of two halves; on a GPU with Triton one kernel in either direction (``fused``)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megadit_kernels.registry import Op, triton_runs


@Op
def swiglu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` of [gate, up] = h + bias along the last dimension: h (..., 2 m), bias (2 m,) -> (..., m).

    Shazeer, arXiv 2002.05202, equation 6. Fused it is computed in float32 and rounded once, and the backward pass
    computes silu again and sums the bias's gradient.
    """
    gate, up = (h if bias is None else h + bias).chunk(2, dim=-1)
    return F.silu(gate) * up


swiglu.implementation("torch", device=None, works=lambda: True)(swiglu.reference)


@swiglu.implementation("fused", works=triton_runs)
def _fused(h: Tensor, bias: Tensor | None = None) -> Tensor:
    from megadit_kernels.swiglu.fused import run

    out: Tensor = run(h, bias)
    return out
