"""Triton kernels of bias and GELU, forward and backward: each element is read once and written once.

A program takes ``BLOCK`` channels of ``ROWS`` rows; in the backward pass it walks over ``passes`` such blocks and sums
their columns in registers, of which it writes one partial sum. Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _share_and_slope(x, TANH: tl.constexpr):
    """gelu(x) / x, and the derivative of gelu(x)."""
    if TANH:
        # 0.5 (1 + tanh(u)) is the sigmoid of 2 u.
        share = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@triton.jit
def _biased(h, bias, at, columns, here, M: tl.constexpr):
    value = tl.load(h + at + columns, mask=here, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + columns, mask=columns < M, other=0.0).to(tl.float32)
    return value


@triton.jit
def forward(h, bias, y, rows, h_row, M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr):
    """y (rows, M) = gelu(h + bias), h of row stride ``h_row``. Grid: (blocks of ROWS rows, of BLOCK channels)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = (row < rows) & (columns < M)
    value = _biased(h, bias, row * h_row, columns, here, M)
    share, _ = _share_and_slope(value, TANH)
    tl.store(y + row * M + columns, (value * share).to(y.dtype.element_ty), mask=here)


@triton.jit
def backward(
    h, bias, dy, dh, partial, rows, h_row, dy_row, passes,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """dh (rows, M) from dy of row stride ``dy_row``. Grid: (chunks of ROWS * passes rows, blocks of BLOCK channels).

    ``partial`` (chunks, M), float32, where there is a bias: the sum of dh over each chunk's rows.
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(passes):
        row = ((tl.program_id(0) * passes + step) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        here = (row < rows) & (columns < M)
        _, slope = _share_and_slope(_biased(h, bias, row * h_row, columns, here, M), TANH)
        grad = tl.load(dy + row * dy_row + columns, mask=here, other=0.0).to(tl.float32) * slope
        tl.store(dh + row * M + columns, grad.to(dh.dtype.element_ty), mask=here)
        total += grad
    if bias is not None:
        across = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(partial + tl.program_id(0) * M + across, tl.sum(total, 0), mask=across < M)
