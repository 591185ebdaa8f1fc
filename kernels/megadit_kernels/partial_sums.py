"""Sums by partial sums of chunks that are added in a fixed order: no atomics. Of columns over rows, of samples.

Importing this module needs Triton.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNKS = 64  # at most; their programs, times the blocks of channels, fill a GPU
_LEAST_ROWS = 32  # of a chunk: a partial sum is written and read once, in float32
_SAMPLE_CHUNK = 16384  # elements of a sample that one program sums: few large samples fill a GPU, too
_COLUMNS, _AT_A_TIME = 128, 16


def passes_of(rows: int, rows_at_a_time: int) -> int:
    """How many blocks of rows a program sums."""
    least = -(-_LEAST_ROWS // rows_at_a_time)
    return max(least, -(-rows // (_CHUNKS * rows_at_a_time)))


def bias_sums(h: Tensor, bias: Tensor | None, rows_at_a_time: int) -> tuple[Tensor, Tensor, int, int]:
    """Of the gradient of ``bias`` (m,), which is added to h (..., m): the gradient and its partial sums (chunks, m)
    float32, both still to be written, how many blocks of rows a chunk has, and how many chunks there are.

    Gradient and partial sums are empty where there is no bias. Called also for tensors without values, so that plans
    count the partial sums.
    """
    width = h.shape[-1]
    gradient = h.new_empty(0) if bias is None else bias.new_empty(width)
    if not h.numel():
        gradient.zero_()
    count = h.numel() // max(width, 1)
    passes = 1 if bias is None else passes_of(count, rows_at_a_time)
    chunks = -(-count // (rows_at_a_time * passes))
    return gradient, h.new_empty((0 if bias is None else chunks, width), dtype=torch.float32), passes, chunks


def chunks_of(count: int, strip: int) -> tuple[int, int]:
    """Elements of each chunk of a sample of ``count``, a multiple of ``strip``, and how many chunks there are.

    By the count alone, so that a sample's sum does not depend on the batch around it.
    """
    chunk = min(_SAMPLE_CHUNK, -(-count // strip) * strip)
    return chunk, -(-count // chunk)


@triton.jit
def add_partials(partial, sums, chunks, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sums (groups, SIZE) of partial (groups, chunks, SIZE), float32. Grid: (blocks of BLOCK columns, groups)."""
    group = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, chunks, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < chunks) & (columns < SIZE)[None, :]
        total += tl.load(partial + (group * chunks + row) * SIZE + columns[None, :], mask=inside, other=0.0)
    tl.store(sums + group * SIZE + columns, tl.sum(total, 0).to(sums.dtype.element_ty), mask=columns < SIZE)


def add_up(partial: Tensor, sums: Tensor) -> None:
    """sums (m,) = partial (chunks, m), or (groups, m) of (groups, chunks, m), float32: over the chunks in a fixed
    order, rounded once."""
    chunks, size = partial.shape[-2:]
    grid = (-(-size // _COLUMNS), sums.numel() // size)
    add_partials[grid](partial, sums, chunks, SIZE=size, ROWS=_AT_A_TIME, BLOCK=_COLUMNS)
