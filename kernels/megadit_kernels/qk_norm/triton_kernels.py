"""Triton kernels of the norm of queries and keys into the joint sequence, forward and backward.

A row is one head of one token: D channels, padded to ``BLOCK``, a power of two. A stream's rows are counted over its
samples, tokens and heads; programs take the image's rows first, then the context's. All arithmetic is float32, right
after each load. The backward pass computes 1 / spread again from what it reads anyway, and sums the gradients of the
gains in registers: each program writes one partial sum per gain, which a second kernel adds in a fixed order.

Strides are given in units of D, a constant, so that the compiler knows how rows are aligned.

Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_of(block, rows, tokens, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sample, token and head of each row of a block, its columns, and which of its elements there are."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    at = row // H
    sample, token = (at // tokens).to(tl.int64), (at % tokens).to(tl.int64)
    return sample, token, row % H, columns, (row < rows) & (columns < D)


@triton.jit
def _gain(gain, columns, D: tl.constexpr):
    return tl.load(gain + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _move(source, gain, target, columns, here, eps, D: tl.constexpr):
    """Rows from ``source`` to ``target``, normed where there is a gain."""
    value = tl.load(source, mask=here, other=0.0).to(tl.float32)
    if gain is not None:
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
        value = value * inverse[:, None] * _gain(gain, columns, D)
    tl.store(target, value.to(target.dtype.element_ty), mask=here)


@triton.jit
def _forward_stream(
    qkv, q_gain, k_gain, q, k, v, block, rows, tokens, first, joint, qkv_batch, qkv_token, q_joint, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    sample, token, head, columns, here = _rows_of(block, rows, tokens, H, D, BLOCK, ROWS)
    source = qkv + (sample * qkv_batch + token * qkv_token + head) * D + columns
    target = ((sample * joint + first + token) * H + head) * D + columns
    if QUERIES:
        _move(source, q_gain, q + ((sample * q_joint + first + token) * H + head) * D + columns, columns, here, eps, D)
    _move(source + H * D, k_gain, k + target, columns, here, eps, D)
    _move(source + 2 * H * D, None, v + target, columns, here, eps, D)


@triton.jit
def forward(
    image, context, image_q_gain, image_k_gain, context_q_gain, context_k_gain, q, k, v,
    image_blocks, image_rows, context_rows, image_tokens, context_tokens, joint, q_joint,
    image_batch, image_token, context_batch, context_token, eps,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CONTEXT_QUERIES: tl.constexpr,
):  # fmt: skip
    """q, k, v (B, joint, H, D), q of q_joint tokens. Grid: blocks of ROWS rows of the image, then of the context."""
    program = tl.program_id(0)
    if program < image_blocks:
        _forward_stream(
            image, image_q_gain, image_k_gain, q, k, v, program, image_rows, image_tokens, 0, joint,
            image_batch, image_token, q_joint, eps, H, D, BLOCK, ROWS, True,
        )  # fmt: skip
    elif context is not None:
        _forward_stream(
            context, context_q_gain, context_k_gain, q, k, v, program - image_blocks, context_rows, context_tokens,
            image_tokens, joint, context_batch, context_token, q_joint, eps, H, D, BLOCK, ROWS, CONTEXT_QUERIES,
        )  # fmt: skip


@triton.jit
def _through_norm(source, gain, grad, columns, here, eps, D: tl.constexpr):
    """The gradient of rows of ``source``, and its share of the gain's gradient; ``grad``: of the normed rows."""
    value = tl.load(source, mask=here, other=0.0).to(tl.float32)
    inverse = (1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps))[:, None]
    normed = value * inverse
    inner = grad * _gain(gain, columns, D)
    along = (tl.sum(inner * normed, 1) / D)[:, None]
    return inverse * (inner - normed * along), grad * normed


@triton.jit
def _backward_stream(
    dq, dk, dv, qkv, q_gain, k_gain, dqkv, partial, block, rows, tokens, first, qkv_batch, qkv_token,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, eps, passes,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    q_sum, k_sum = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(passes):
        sample, token, head, columns, here = _rows_of(block * passes + step, rows, tokens, H, D, BLOCK, ROWS)
        position = first + token
        out = dqkv + ((sample * tokens + token) * 3 * H + head) * D + columns
        source = dv + (sample * dv_batch + position * dv_token + head * dv_head) * D + columns
        tl.store(out + 2 * H * D, tl.load(source, mask=here, other=0.0), mask=here)
        at = (sample * qkv_batch + token * qkv_token + head) * D + columns
        grad = tl.zeros([ROWS, BLOCK], tl.float32)
        if QUERIES:
            source = dq + (sample * dq_batch + position * dq_token + head * dq_head) * D + columns
            grad = tl.load(source, mask=here, other=0.0).to(tl.float32)
            if q_gain is not None:
                grad, share = _through_norm(qkv + at, q_gain, grad, columns, here, eps, D)
                q_sum += share
        tl.store(out, grad.to(out.dtype.element_ty), mask=here)
        source = dk + (sample * dk_batch + position * dk_token + head * dk_head) * D + columns
        grad = tl.load(source, mask=here, other=0.0).to(tl.float32)
        if k_gain is not None:
            grad, share = _through_norm(qkv + at + H * D, k_gain, grad, columns, here, eps, D)
            k_sum += share
        tl.store(out + H * D, grad.to(out.dtype.element_ty), mask=here)
    if q_gain is not None:
        across = tl.arange(0, BLOCK)
        tl.store(partial + across, tl.sum(q_sum, 0), mask=across < D)
        tl.store(partial + D + across, tl.sum(k_sum, 0), mask=across < D)


@triton.jit
def backward(
    dq, dk, dv, image, context, image_q_gain, image_k_gain, context_q_gain, context_k_gain, dimage, dcontext, partial,
    image_programs, image_rows, context_rows, image_tokens, context_tokens,
    image_batch, image_token, context_batch, context_token,
    dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, eps, passes,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CONTEXT_QUERIES: tl.constexpr,
):  # fmt: skip
    """Gradients of ``forward``. Grid: programs of ROWS * passes rows of the image, then of the context.

    ``partial`` (programs, 2, D), float32, gets the sums over a program's rows for the gains of q and k.
    """
    program = tl.program_id(0)
    sums = partial + program * 2 * D
    if program < image_programs:
        _backward_stream(
            dq, dk, dv, image, image_q_gain, image_k_gain, dimage, sums, program, image_rows, image_tokens, 0,
            image_batch, image_token, dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head,
            dv_batch, dv_token, dv_head, eps, passes, H, D, BLOCK, ROWS, True,
        )  # fmt: skip
    elif dcontext is not None:
        _backward_stream(
            dq, dk, dv, context, context_q_gain, context_k_gain, dcontext, sums, program - image_programs,
            context_rows, context_tokens, image_tokens, context_batch, context_token,
            dq_batch, dq_token, dq_head, dk_batch, dk_token, dk_head, dv_batch, dv_token, dv_head, eps, passes,
            H, D, BLOCK, ROWS, CONTEXT_QUERIES,
        )  # fmt: skip


@triton.jit
def add_partials(partial, sums, image_programs, programs, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """sums (streams, 2, D) of partial (programs, 2, D), in a fixed order. Grid: (streams, 2)."""
    stream, which = tl.program_id(0), tl.program_id(1)
    first = stream * image_programs
    last = image_programs + stream * (programs - image_programs)
    columns = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + (row * 2 + which) * D + columns, mask=(row < last) & (columns < D), other=0.0)
    across = tl.arange(0, BLOCK)
    tl.store(sums + (stream * 2 + which) * D + across, tl.sum(total, 0).to(sums.dtype.element_ty), mask=across < D)
