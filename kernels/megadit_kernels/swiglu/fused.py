"""The Triton implementation of SwiGLU's product: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megadit_kernels.operators import KernelOperator, launches
from megadit_kernels.swiglu import triton_kernels


def _block(width: int) -> int:
    """Channels per program: at most 1,024, of which a thread of 4 warps takes 8, 16 bytes of bfloat16."""
    return min(1024, 1 << (width - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def forward(h: Tensor) -> Tensor:
    """(..., 2 m) -> (..., m)."""
    width = h.shape[-1] // 2
    y = h.new_empty((*h.shape[:-1], width))
    if launches(y):
        rows, block = _rows(h), _block(width)
        triton_kernels.forward[(len(rows), -(-width // block))](rows, y, rows.stride(0), M=width, BLOCK=block)
    return y


def backward(h: Tensor, dy: Tensor) -> Tensor:
    """The gradient of h, from that of the result."""
    width = h.shape[-1] // 2
    dh = h.new_empty(h.shape)
    if launches(dh):
        rows, grads, block = _rows(h), _rows(dy), _block(width)
        triton_kernels.backward[(len(rows), -(-width // block))](
            rows, grads, dh, rows.stride(0), grads.stride(0), M=width, BLOCK=block
        )
    return dh


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(launch: Callable[[Tensor, Tensor], Tensor], ctx: Any, dy: Tensor) -> Tensor:
    (h,) = ctx.saved_tensors
    return launch(h, dy)


run = KernelOperator("swiglu", forward, backward, _save, _gradient)
