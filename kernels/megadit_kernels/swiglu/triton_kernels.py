"""Triton kernels of SwiGLU's product, forward and backward: each element is read once and written once.

A program takes ``BLOCK`` channels of one row. Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(h, y, h_row, M: tl.constexpr, BLOCK: tl.constexpr):
    """y (rows, M) = silu(h[:, :M]) * h[:, M:], h (rows, 2 M) with row stride ``h_row``. Grid: (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < M
    gate = tl.load(h + row * h_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + row * h_row + M + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * M + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(h, dy, dh, h_row, dy_row, M: tl.constexpr, BLOCK: tl.constexpr):
    """dh (rows, 2 M) from dy (rows, M) with row stride ``dy_row``. Grid as of ``forward``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < M
    gate = tl.load(h + row * h_row + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + row * h_row + M + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_row + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = grad * gate * sigmoid
    tl.store(dh + row * 2 * M + columns, dgate.to(dh.dtype.element_ty), mask=inside)
    tl.store(dh + row * 2 * M + M + columns, dup.to(dh.dtype.element_ty), mask=inside)
