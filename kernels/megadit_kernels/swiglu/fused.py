"""The Triton implementation of SwiGLU's product: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megadit_kernels.operators import KernelOperator, launches, rows_of
from megadit_kernels.partial_sums import add_up, bias_sums
from megadit_kernels.swiglu import triton_kernels

_ROWS, _BLOCK = 4, 256  # of a program of 4 warps: 8 elements a thread of gate and of up, 16 bytes of bfloat16


def forward(h: Tensor, bias: Tensor | None) -> Tensor:
    """h (..., 2 m), bias (2 m,) or None -> (..., m)."""
    width = h.shape[-1] // 2
    y = h.new_empty((*h.shape[:-1], width))
    if launches(y):
        rows = rows_of(h)
        triton_kernels.forward[(-(-len(rows) // _ROWS), -(-width // _BLOCK))](
            rows, bias, y, len(rows), rows.stride(0), M=width, ROWS=_ROWS, BLOCK=_BLOCK
        )
    return y


def backward(h: Tensor, bias: Tensor | None, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of h and of the bias, from that of the result; the bias's is empty where there is none."""
    width = h.shape[-1] // 2
    dh = h.new_empty(h.shape)
    dbias, partial, passes, chunks = bias_sums(h, bias, _ROWS)
    if launches(dh):
        rows, grads = rows_of(h), rows_of(dy)
        triton_kernels.backward[(chunks, -(-width // _BLOCK))](
            rows, bias, grads, dh, partial, len(rows), rows.stride(0), grads.stride(0), passes,
            M=width, ROWS=_ROWS, BLOCK=_BLOCK,
        )  # fmt: skip
        if bias is not None:
            add_up(partial, dbias)
    return dh, dbias


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(launch: Callable[..., tuple[Tensor, Tensor]], ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    h, bias = ctx.saved_tensors
    dh, dbias = launch(h, bias, dy)
    return dh, None if bias is None else dbias


run = KernelOperator("swiglu", forward, backward, _save, _gradients)
