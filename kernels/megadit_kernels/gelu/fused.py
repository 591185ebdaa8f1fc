"""The Triton implementation of bias and GELU: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megadit_kernels.gelu import triton_kernels
from megadit_kernels.operators import KernelOperator, launches, rows_of
from megadit_kernels.partial_sums import add_up, bias_sums

_ROWS, _BLOCK = 8, 256  # of a program of 4 warps: 16 elements a thread, in pieces of 16 bytes


def forward(h: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """h (..., m), bias (m,) or None -> (..., m)."""
    y = h.new_empty(h.shape)
    if launches(y):
        rows, width = rows_of(h), h.shape[-1]
        triton_kernels.forward[(-(-len(rows) // _ROWS), -(-width // _BLOCK))](
            rows, bias, y, len(rows), rows.stride(0), M=width, ROWS=_ROWS, BLOCK=_BLOCK, TANH=approximate == "tanh"
        )
    return y


def backward(h: Tensor, bias: Tensor | None, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of h and of the bias; the latter is empty where there is none."""
    width = h.shape[-1]
    dh = h.new_empty(h.shape)
    dbias, partial, passes, chunks = bias_sums(h, bias, _ROWS)
    if launches(dh):
        rows, grads = rows_of(h), rows_of(dy)
        triton_kernels.backward[(chunks, -(-width // _BLOCK))](
            rows, bias, grads, dh, partial, len(rows), rows.stride(0), grads.stride(0), passes,
            M=width, ROWS=_ROWS, BLOCK=_BLOCK, TANH=approximate == "tanh",
        )  # fmt: skip
        if bias is not None:
            add_up(partial, dbias)
    return dh, dbias


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, str], output: Tensor) -> None:
    h, bias, ctx.approximate = inputs
    ctx.save_for_backward(h, bias)


def _gradients(
    launch: Callable[..., tuple[Tensor, Tensor]], ctx: Any, dy: Tensor
) -> tuple[Tensor, Tensor | None, None]:
    h, bias = ctx.saved_tensors
    dh, dbias = launch(h, bias, dy, ctx.approximate)
    return dh, None if bias is None else dbias, None


run = KernelOperator("bias_gelu", forward, backward, _save, _gradients)
