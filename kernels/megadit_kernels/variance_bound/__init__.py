"""The variational bound of a learned variance; on a GPU with Triton one kernel in either direction (``fused``)."""

from __future__ import annotations

from torch import Tensor

from megadit_kernels.registry import Op, triton_runs
from megadit_kernels.variance_bound import reference

variance_bound = Op(reference.variance_bound)
variance_bound.implementation("torch", device=None, works=lambda: True)(variance_bound.reference)


@variance_bound.implementation("fused", works=triton_runs)
def _fused(variance: Tensor, prediction: Tensor, x0: Tensor, x: Tensor, coefficients: Tensor, predicts: str) -> Tensor:
    from megadit_kernels.variance_bound.fused import run

    out: Tensor = run(variance, prediction.detach(), x0, x, coefficients, predicts)
    return out
