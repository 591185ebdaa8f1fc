"""Triton kernels of the gated residual, the norm and the modulation in one pass, forward and backward.

A row is one token's n channels, held by one program in two parts, since Triton's blocks are powers of two: ``MAIN``,
the largest that fits, and ``TAIL``, what is left (1536 = 1024 + 512, 5120 = 4096 + 1024). All arithmetic is float32,
right after each load. The backward pass walks over the rows of one sample and sums their columns in registers: each
program writes one partial sum, which ``partial_sums`` adds in a fixed order. So the gradients of shift, scale and gate
need no atomics and are the same bits each time.

Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _per_sample(value, row, sample, columns, inside, ONE: tl.constexpr):
    """``ONE`` + the sample's vector + the vector that all samples share; either may be None."""
    total = tl.zeros(columns.shape, tl.float32) + ONE
    if value is not None:
        total += tl.load(value + sample + columns, mask=inside, other=0.0).to(tl.float32)
    if row is not None:
        total += tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _residual(x, branch, gate, gate_row, new_x, x_at, branch_at, new_at, gate_at, columns, rows, N: tl.constexpr):
    """x + gate * branch of a block of rows, rounded to the dtype that it is stored in; stores it as new_x."""
    inside = columns < N
    here = rows & inside
    value = tl.load(x + x_at + columns, mask=here, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + branch_at + columns, mask=here, other=0.0).to(tl.float32)
        if gate is not None or gate_row is not None:
            added *= _per_sample(gate, gate_row, gate_at, columns, inside, 0.0)
        rounded = (value + added).to(new_x.dtype.element_ty)
        tl.store(new_x + new_at + columns, rounded, mask=here)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _modulate(
    value, inverse, y, shift, shift_row, scale, scale_row, y_at, shift_at, scale_at, columns, rows,
    N: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Scale by the row's 1 / spread, modulate and store a part of y."""
    inside = columns < N
    value = value * inverse * _per_sample(scale, scale_row, scale_at, columns, inside, ONE)
    value += _per_sample(shift, shift_row, shift_at, columns, inside, 0.0)
    tl.store(y + y_at + columns, value.to(y.dtype.element_ty), mask=rows & inside)


@triton.jit
def forward(
    x, branch, gate, gate_row, shift, shift_row, scale, scale_row, new_x, y, mean, rstd,
    tokens, x_batch, x_token, branch_batch, branch_token, gate_batch, shift_batch, scale_batch, eps,
    N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """new_x = x + gate * branch; y = norm(new_x) * (ONE + scale) + shift. Grid: (blocks of ROWS tokens, samples)."""
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    rows = token < tokens
    x_at = sample * x_batch + token * x_token
    branch_at = sample * branch_batch + token * branch_token
    row_at = sample * tokens + token
    gate_at, shift_at, scale_at = sample * gate_batch, sample * shift_batch, sample * scale_batch
    left, right = tl.arange(0, MAIN)[None, :], None
    a = _residual(x, branch, gate, gate_row, new_x, x_at, branch_at, row_at * N, gate_at, left, rows, N)
    if TAIL > 0:
        right = MAIN + tl.arange(0, TAIL)[None, :]
        b = _residual(x, branch, gate, gate_row, new_x, x_at, branch_at, row_at * N, gate_at, right, rows, N)
    if NORM != "none":
        if NORM == "layer":
            total = tl.sum(a, 1)
            if TAIL > 0:
                total += tl.sum(b, 1)
            centre = (total / N)[:, None]
            tl.store(mean + row_at, centre, mask=rows)
            a = tl.where(left < N, a - centre, 0.0)
            if TAIL > 0:
                b = tl.where(right < N, b - centre, 0.0)
        squares = tl.sum(a * a, 1)
        if TAIL > 0:
            squares += tl.sum(b * b, 1)
        inverse = (1.0 / tl.sqrt(squares / N + eps))[:, None]
        tl.store(rstd + row_at, inverse, mask=rows)
        _modulate(a, inverse, y, shift, shift_row, scale, scale_row, row_at * N, shift_at, scale_at, left, rows, N, ONE)
        if TAIL > 0:
            _modulate(
                b, inverse, y, shift, shift_row, scale, scale_row, row_at * N, shift_at, scale_at, right, rows, N, ONE
            )


@triton.jit
def _normed(new_x, dy, centre, inverse, factor, x_at, dy_at, columns, here, NORM: tl.constexpr):
    """Of a part of a block of rows: the normed value, dy, and dy with respect to the normed value."""
    value = tl.load(new_x + x_at + columns, mask=here, other=0.0).to(tl.float32)
    if NORM == "layer":
        value -= centre
    value = tl.where(here, value * inverse, 0.0)
    grad = tl.load(dy + dy_at + columns, mask=here, other=0.0).to(tl.float32)
    return value, grad, grad * factor


@triton.jit
def _through_residual(dx, dbranch, dnew, branch, total, gate, row_at, dnew_at, branch_at, columns, here):
    """Add the gradient of new_x to ``total``, what came through the norm; store the gradients of x and branch.

    Returns gradient * branch, whose sum over rows is the gradient of the gate.
    """
    if dnew is not None:
        total += tl.load(dnew + dnew_at + columns, mask=here, other=0.0).to(tl.float32)
    if dx is not None:
        tl.store(dx + row_at + columns, total.to(dx.dtype.element_ty), mask=here)
    if dbranch is not None:
        tl.store(dbranch + row_at + columns, (total * gate).to(dbranch.dtype.element_ty), mask=here)
        total *= tl.load(branch + branch_at + columns, mask=here, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_sums(partial, shift, scale, gate, columns, N: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):
    """The sums over a chunk's rows of the gradients of shift, scale and gate, those that there are: rows of N."""
    inside = columns < N
    if NORM != "none":
        tl.store(partial + columns, tl.sum(shift, 0), mask=inside)
        tl.store(partial + N + columns, tl.sum(scale, 0), mask=inside)
        partial += 2 * N
    if GATED:
        tl.store(partial + columns, tl.sum(gate, 0), mask=inside)


@triton.jit
def backward(
    new_x, dy, dnew, branch, gate, gate_row, scale, scale_row, mean, rstd, dx, dbranch, partial,
    tokens, x_batch, x_token, dy_batch, dy_token, dnew_batch, dnew_token, branch_batch, branch_token,
    gate_batch, scale_batch,
    N: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, PASSES: tl.constexpr,
    NORM: tl.constexpr, ONE: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``forward``. Grid: (chunks of ROWS * PASSES tokens, samples).

    dx and, where GATED, dbranch get a row per token; ``partial`` (samples, chunks, SUMS, N), float32, gets the chunk's
    sums: for shift and scale where there is a norm, then for the gate where GATED.
    """
    sample, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    gate_at, scale_at = sample * gate_batch, sample * scale_batch
    left = tl.arange(0, MAIN)[None, :]
    factor_a = _per_sample(scale, scale_row, scale_at, left, left < N, ONE)
    open_a = _per_sample(gate, gate_row, gate_at, left, left < N, 0.0)
    shift_a, scale_a = tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, MAIN], tl.float32)
    gate_a = tl.zeros([ROWS, MAIN], tl.float32)
    if TAIL > 0:
        right = MAIN + tl.arange(0, TAIL)[None, :]
        factor_b = _per_sample(scale, scale_row, scale_at, right, right < N, ONE)
        open_b = _per_sample(gate, gate_row, gate_at, right, right < N, 0.0)
        shift_b, scale_b = tl.zeros([ROWS, TAIL], tl.float32), tl.zeros([ROWS, TAIL], tl.float32)
        gate_b = tl.zeros([ROWS, TAIL], tl.float32)

    for step in range(PASSES):
        token = (chunk * PASSES + step) * ROWS + tl.arange(0, ROWS)[:, None]
        rows = token < tokens
        row_at = sample * tokens + token
        dnew_at, branch_at = sample * dnew_batch + token * dnew_token, sample * branch_batch + token * branch_token
        here_a = rows & (left < N)
        total_a = tl.zeros([ROWS, MAIN], tl.float32)
        if TAIL > 0:
            here_b = rows & (right < N)
            total_b = tl.zeros([ROWS, TAIL], tl.float32)
        if NORM != "none":
            x_at, dy_at = sample * x_batch + token * x_token, sample * dy_batch + token * dy_token
            inverse = tl.load(rstd + row_at, mask=rows, other=0.0)
            centre = tl.load(mean + row_at, mask=rows, other=0.0) if NORM == "layer" else 0.0
            hat_a, grad_a, inner_a = _normed(new_x, dy, centre, inverse, factor_a, x_at, dy_at, left, here_a, NORM)
            shift_a += grad_a
            scale_a += grad_a * hat_a
            along, across = tl.sum(inner_a * hat_a, 1), tl.sum(inner_a, 1)
            if TAIL > 0:
                hat_b, grad_b, inner_b = _normed(new_x, dy, centre, inverse, factor_b, x_at, dy_at, right, here_b, NORM)
                shift_b += grad_b
                scale_b += grad_b * hat_b
                along += tl.sum(inner_b * hat_b, 1)
                across += tl.sum(inner_b, 1)
            along = (along / N)[:, None]
            across = (across / N)[:, None] if NORM == "layer" else 0.0
            total_a = inverse * (inner_a - across - hat_a * along)
            if TAIL > 0:
                total_b = inverse * (inner_b - across - hat_b * along)
        gate_a += _through_residual(
            dx, dbranch, dnew, branch, total_a, open_a, row_at * N, dnew_at, branch_at, left, here_a
        )
        if TAIL > 0:
            gate_b += _through_residual(
                dx, dbranch, dnew, branch, total_b, open_b, row_at * N, dnew_at, branch_at, right, here_b
            )

    at = partial + (sample * tl.num_programs(0) + chunk) * SUMS * N
    _store_sums(at, shift_a, scale_a, gate_a, tl.arange(0, MAIN), N, NORM, GATED)
    if TAIL > 0:
        _store_sums(at, shift_b, scale_b, gate_b, MAIN + tl.arange(0, TAIL), N, NORM, GATED)
