"""The Triton implementation of the variational bound: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megadit_kernels.operators import KernelOperator, launches
from megadit_kernels.partial_sums import add_up, chunks_of
from megadit_kernels.variance_bound import triton_kernels

_STRIP = 1024  # elements of a sample that a program takes at once


def forward(variance: Tensor, prediction: Tensor, x0: Tensor, x: Tensor, coefficients: Tensor, predicts: str) -> Tensor:
    """variance, prediction, x0, x (B, ...), coefficients (B, 7) -> float32 (B,)."""
    out = x.new_empty((x.shape[0],), dtype=torch.float32)
    if launches(out):
        spread, given = variance.flatten(1), prediction.flatten(1)  # views of the model's output
        chunk, chunks = chunks_of(spread.shape[1], _STRIP)
        parts = out if chunks == 1 else out.new_empty((chunks, len(out)))
        triton_kernels.bound[(len(out), chunks)](
            spread, given, x0.contiguous(), x.contiguous(), coefficients.contiguous(), parts, spread.stride(0),
            given.stride(0), COUNT=spread.shape[1], PREDICTS=predicts, CHUNK=chunk, BLOCK=_STRIP,
        )  # fmt: skip
        if chunks > 1:
            add_up(parts, out)
    return out


def backward(
    variance: Tensor, prediction: Tensor, x0: Tensor, x: Tensor, coefficients: Tensor, grad: Tensor, predicts: str
) -> Tensor:
    """The gradient of variance from that of the bounds, (B,)."""
    out = variance.new_empty(variance.shape)
    if launches(out):
        spread, given = variance.flatten(1), prediction.flatten(1)
        count = spread.shape[1]
        triton_kernels.bound_backward[(len(out), -(-count // _STRIP))](
            spread, given, x0.contiguous(), x.contiguous(), coefficients.contiguous(), grad.contiguous(), out,
            spread.stride(0), given.stride(0), COUNT=count, PREDICTS=predicts, BLOCK=_STRIP,
        )  # fmt: skip
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.predicts = inputs
    ctx.save_for_backward(*tensors)


def _gradients(launch: Callable[..., Tensor], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return launch(*ctx.saved_tensors, grad, ctx.predicts), None, None, None, None, None


run = KernelOperator("variance_bound", forward, backward, _save, _gradients)
