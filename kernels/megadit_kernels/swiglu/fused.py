"""The Triton implementation of SwiGLU's product: launches, autograd and torch's operator registry.

Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megadit_kernels.registry import launches
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


class _Eager(torch.autograd.Function):
    """Without torch's operator registry, whose dispatch costs several times as much per call."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return forward(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return backward(h, dy)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    (h,) = ctx.saved_tensors
    return _backward_op(h, dy)


_forward_op = torch.library.custom_op("megadit::swiglu", forward, mutates_args=())
_backward_op = torch.library.custom_op("megadit::swiglu_backward", backward, mutates_args=())
_forward_op.register_fake(forward)
_backward_op.register_fake(backward)
_forward_op.register_autograd(_gradient, setup_context=_setup)


def run(h: Tensor) -> Tensor:
    """``forward``, differentiable: by an operator that torch.compile keeps whole, in eager mode without it."""
    if torch.compiler.is_compiling():
        return _forward_op(h)
    out: Tensor = _Eager.apply(h)
    return out
