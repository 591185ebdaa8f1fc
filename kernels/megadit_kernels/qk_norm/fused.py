"""The Triton implementation of the norm of queries and keys into the joint sequence: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megadit_kernels.operators import KernelOperator, launches
from megadit_kernels.qk_norm import triton_kernels

_ELEMENTS = 2048  # of q, of k and of v each, that a program holds
_WARPS = 4  # of the forward pass: 16 elements a thread; the backward pass, which holds sums besides, has twice as many
# Programs of the backward pass, eight per multiprocessor of an H200; each writes a partial sum for every gain.
_PROGRAMS = 8 * 132
_PARTIALS = 16  # that the second kernel adds at a time


def _block(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()


def _rows_at_a_time(head_dim: int) -> int:
    """Heads of tokens per block: by their size alone, so that a result does not depend on the batch around it."""
    return max(1, _ELEMENTS // _block(head_dim))


def _in_place(qkv: Tensor) -> Tensor:
    """qkv (B, T, 3, h, d), a token's channels side by side and strides in units of d; copied where it is otherwise."""
    heads, d = qkv.shape[3:]
    side_by_side = all(
        size == 1 or stride == expected
        for size, stride, expected in zip(qkv.shape[2:], qkv.stride()[2:], (heads * d, d, 1), strict=True)
    )
    return qkv if side_by_side and _by_heads(qkv) else qkv.contiguous()


def _by_heads(x: Tensor) -> bool:
    d = x.shape[-1]
    return x.stride(-1) == 1 and all(stride % d == 0 for stride in x.stride()[:-1])


def _strides(x: Tensor | None, dims: int) -> list[int]:
    """The first ``dims`` strides in units of d."""
    return [0] * dims if x is None else [stride // x.shape[-1] for stride in x.stride()[:dims]]


def forward(
    image: Tensor,
    context: Tensor | None,
    image_q_gain: Tensor | None,
    image_k_gain: Tensor | None,
    context_q_gain: Tensor | None,
    context_k_gain: Tensor | None,
    context_queries: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """image (B, T, 3, h, d), context (B, L, 3, h, d), gains (d,) -> q, k, v (B, T + L, h, d), contiguous."""
    batch, tokens, _, heads, d = image.shape
    text = 0 if context is None else context.shape[1]
    joint = tokens + text
    q_joint = joint if context_queries else tokens
    q, k, v = (image.new_empty((batch, size, heads, d)) for size in (q_joint, joint, joint))
    if launches(k):
        image, context = _in_place(image), None if context is None else _in_place(context)
        rows = _rows_at_a_time(d)
        image_rows, context_rows = batch * tokens * heads, batch * text * heads
        image_blocks = -(-image_rows // rows)
        triton_kernels.forward[(image_blocks + -(-context_rows // rows),)](
            image, context, image_q_gain, image_k_gain, context_q_gain, context_k_gain, q, k, v,
            image_blocks, image_rows, context_rows, tokens, text, joint, q_joint,
            *_strides(image, 2), *_strides(context, 2), eps,
            H=heads, D=d, BLOCK=_block(d), ROWS=rows, CONTEXT_QUERIES=context_queries, num_warps=_WARPS,
        )  # fmt: skip
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    image: Tensor | None,
    context: Tensor | None,
    image_q_gain: Tensor | None,
    image_k_gain: Tensor | None,
    context_q_gain: Tensor | None,
    context_k_gain: Tensor | None,
    tokens: int,
    context_queries: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image (B, T, 3, h, d) and context (B, L, 3, h, d), and of the gains (streams, 2, d).

    ``tokens``: T. The context's is empty where there is none; without gains those of the gains are empty, and image and
    context are not read.
    """
    batch, joint, heads, d = dk.shape
    text = joint - tokens
    dimage = dk.new_empty((batch, tokens, 3, heads, d))
    dcontext = dk.new_empty((batch, text, 3, heads, d) if text else 0)
    like = dk if image_q_gain is None else image_q_gain
    sums = like.new_empty(0 if image_q_gain is None else (1 if context_q_gain is None else 2, 2, d))
    if not dk.numel():
        sums.zero_()
    if launches(dk):
        dq, dk, dv = (part if _by_heads(part) else part.contiguous() for part in (dq, dk, dv))
        image = None if image is None else _in_place(image)
        context = None if context is None else _in_place(context)
        rows = max(1, 2 * _rows_at_a_time(d) // dk.element_size())  # in float32 half as many: registers run out
        image_rows, context_rows = batch * tokens * heads, batch * text * heads
        passes = max(1, -(-(image_rows + context_rows) // (rows * _PROGRAMS)))
        image_programs, context_programs = (-(-size // (rows * passes)) for size in (image_rows, context_rows))
        programs = image_programs + context_programs
        partial = dk.new_empty((0 if image_q_gain is None else programs, 2, d), dtype=torch.float32)
        triton_kernels.backward[(programs,)](
            dq, dk, dv, image, context, image_q_gain, image_k_gain, context_q_gain, context_k_gain,
            dimage, dcontext if text else None, partial, image_programs, image_rows, context_rows, tokens, text,
            *_strides(image, 2), *_strides(context, 2), *_strides(dq, 3), *_strides(dk, 3), *_strides(dv, 3),
            eps, passes,
            H=heads, D=d, BLOCK=_block(d), ROWS=rows, CONTEXT_QUERIES=context_queries,
            num_warps=2 * _WARPS,
        )  # fmt: skip
        if image_q_gain is not None:
            triton_kernels.add_partials[(len(sums), 2)](
                partial, sums, image_programs, programs, D=d, BLOCK=_block(d), ROWS=_PARTIALS
            )
    return dimage, dcontext, sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, context, *gains, ctx.context_queries, ctx.eps = inputs
    normed = gains[0] is not None
    ctx.save_for_backward(image if normed else None, context if normed else None, *gains)
    ctx.tokens, ctx.has_context = image.shape[1], context is not None
    ctx.dtypes = [None if gain is None else gain.dtype for gain in gains]
    ctx.context_shape = None if context is None else context.shape


def _gradients(
    launch: Callable[..., tuple[Tensor, Tensor, Tensor]], ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor | None, ...]:
    """Of all arguments of ``forward``, from those of q, k and v. ``launch``: ``backward``, or the operator of it."""
    dimage, dcontext, sums = launch(dq, dk, dv, *ctx.saved_tensors, ctx.tokens, ctx.context_queries, ctx.eps)
    of_gains = [None if dtype is None else sums[at // 2, at % 2].to(dtype) for at, dtype in enumerate(ctx.dtypes)]
    return dimage, dcontext.view(ctx.context_shape) if ctx.has_context else None, *of_gains, None, None


run = KernelOperator("qk_norm", forward, backward, _save, _gradients)
