"""Triton kernels of SwiGLU's product, forward and backward: each element is read once and written once.

A program takes ``BLOCK`` channels of ``ROWS`` rows; in the backward pass it walks over ``passes`` such blocks and sums
their columns in registers for the bias's gradient, of which it writes one partial sum. Importing this module needs
Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _biased(h, bias, at, columns, inside, here):
    value = tl.load(h + at + columns, mask=here, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def forward(h, bias, y, rows, h_row, M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y (rows, M) = silu(gate) * up of [gate, up] = h + bias, h (rows, 2 M) with row stride ``h_row``, bias (2 M,).

    Grid: (blocks of ROWS rows, blocks of BLOCK channels).
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < M
    here = (row < rows) & inside
    gate = _biased(h, bias, row * h_row, columns, inside, here)
    up = _biased(h, bias, row * h_row, columns + M, inside, here)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y + row * M + columns, out.to(y.dtype.element_ty), mask=here)


@triton.jit
def backward(
    h, bias, dy, dh, partial, rows, h_row, dy_row, passes,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dh (rows, 2 M) from dy (rows, M) with row stride ``dy_row``. Grid: (chunks of ROWS * passes rows, blocks).

    ``partial`` (chunks, 2 M), float32, where there is a bias: the sum of dh over each chunk's rows.
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = columns < M
    gate_sum, up_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(passes):
        row = ((tl.program_id(0) * passes + step) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        here = (row < rows) & inside
        gate = _biased(h, bias, row * h_row, columns, inside, here)
        up = _biased(h, bias, row * h_row, columns + M, inside, here)
        grad = tl.load(dy + row * dy_row + columns, mask=here, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dup = grad * gate * sigmoid
        tl.store(dh + row * 2 * M + columns, dgate.to(dh.dtype.element_ty), mask=here)
        tl.store(dh + row * 2 * M + M + columns, dup.to(dh.dtype.element_ty), mask=here)
        gate_sum += dgate
        up_sum += dup
    if bias is not None:
        across = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        sums = partial + tl.program_id(0) * 2 * M + across
        tl.store(sums, tl.sum(gate_sum, 0), mask=across < M)
        tl.store(sums + M, tl.sum(up_sum, 0), mask=across < M)
