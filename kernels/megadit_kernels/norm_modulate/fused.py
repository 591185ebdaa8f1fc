"""The Triton implementation of gated residual, norm and modulation: launches and gradients.

Importing this module needs Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadit_kernels.norm_modulate import triton_kernels
from megadit_kernels.operators import KernelOperator, launches
from megadit_kernels.partial_sums import add_up

# Programs that give each multiprocessor of an A100 (108) or H200 (132) one.
_ENOUGH_PROGRAMS = 132


class Launch(NamedTuple):
    """How a row of ``width`` channels lies in a program: its two parts, rows at a time, warps."""

    main: int
    tail: int
    rows: int
    warps: int


def _power(value: int) -> int:
    """The largest power of two that is not above ``value``; 1 at least."""
    return 1 << (max(value, 1).bit_length() - 1)


def launch_of(width: int, *, backward: bool) -> Launch:
    """By the width alone, so that a row's result does not depend on the batch around it.

    One masked block where threads would load less than 16 bytes each of the tail, unless the backward pass, which holds
    sums of columns besides, would run out of registers.
    """
    elements, per_thread = (2048, 8) if backward else (4096, 32)
    main = _power(width)
    tail = 1 << (width - main - 1).bit_length() if width > main else 0

    def launch(main: int, tail: int) -> Launch:
        rows = _power(elements // (main + tail))
        return Launch(main, tail, rows, _power(min(16, max(4, (main + tail) * rows // (32 * per_thread)))))

    split = launch(main, tail)
    narrow = 0 < tail * split.rows < 8 * 32 * split.warps
    return launch(2 * main, 0) if narrow and not (backward and 2 * main > 4096) else split


def passes_of(tokens: int, samples: int, rows: int) -> int:
    """How many blocks of ``rows`` tokens one program of the backward pass sums.

    64 tokens in all, or 32 where programs would be few: a partial sum is written and read once per program, in float32,
    which at 32 tokens are 6 % of what the program moves besides.
    """
    chunk = 64 if samples * -(-tokens // 64) >= _ENOUGH_PROGRAMS else 32
    return max(1, chunk // rows)


def _rows_of(x: Tensor) -> Tensor:
    """x (B, T, n) with channels side by side; other strides are taken as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sample_stride(value: Tensor | None) -> int:
    return 0 if value is None else value.stride(0)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    shift: Tensor | None,
    shift_row: Tensor | None,
    scale: Tensor | None,
    scale_row: Tensor | None,
    eps: float,
    norm: str,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """new_x and y (B, T, n), mean and rstd (B, T) in float32; each empty where it is not computed."""
    batch, tokens, width = x.shape
    x = _rows_of(x)
    branch = None if branch is None else _rows_of(branch)
    nothing = x.new_empty(0)
    new_x = nothing if branch is None else x.new_empty(x.shape)
    y = nothing if norm == "none" else x.new_empty(x.shape)
    mean = x.new_empty((batch, tokens) if norm == "layer" else 0, dtype=torch.float32)
    rstd = x.new_empty((batch, tokens) if norm != "none" else 0, dtype=torch.float32)
    if launches(x):
        launch = launch_of(width, backward=False)
        triton_kernels.forward[(-(-tokens // launch.rows), batch)](
            x, branch, gate, gate_row, shift, shift_row, scale, scale_row,
            None if branch is None else new_x, None if norm == "none" else y, mean, rstd,
            tokens, x.stride(0), x.stride(1),
            0 if branch is None else branch.stride(0), 0 if branch is None else branch.stride(1),
            _sample_stride(gate), _sample_stride(shift), _sample_stride(scale), eps,
            N=width, MAIN=launch.main, TAIL=launch.tail, ROWS=launch.rows, NORM=norm, ONE=one,
            num_warps=launch.warps,
        )  # fmt: skip
    return new_x, y, mean, rstd


def backward(
    new_x: Tensor,
    dy: Tensor | None,
    dnew: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    gate_row: Tensor | None,
    scale: Tensor | None,
    scale_row: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    one: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dbranch (B, T, n), the sums over tokens (B, k, n), and those over samples besides (k, n).

    Sums: for shift and scale where the norm's result was used (dy), then for the gate where there is one; those over
    tokens in new_x's dtype, but float32 where there is a row that samples share, whose dtype has the second, else
    empty. Without a gate dbranch is empty: it equals dx. Without dy dx is empty: it equals dnew.
    """
    batch, tokens, width = new_x.shape
    norm = "none" if dy is None else norm
    gated = gate is not None or gate_row is not None
    count = 2 * (norm != "none") + gated
    new_x = _rows_of(new_x)
    branch, dy, dnew = (None if part is None else _rows_of(part) for part in (branch, dy, dnew))
    dx = new_x.new_empty(0 if norm == "none" else new_x.shape)
    dbranch = new_x.new_empty(new_x.shape if gated else 0)
    launch = launch_of(width, backward=True)
    passes = passes_of(tokens, batch, launch.rows)
    chunks = -(-tokens // (launch.rows * passes))
    row = scale_row if gate_row is None else gate_row
    sums = new_x.new_empty((batch, count, width), dtype=new_x.dtype if row is None else torch.float32)
    row_sums = new_x.new_empty(0 if row is None else (count, width), dtype=None if row is None else row.dtype)
    if not new_x.numel():
        sums.zero_()
        row_sums.zero_()
    partial = new_x.new_empty((batch, chunks, count, width), dtype=torch.float32)  # on meta, too: plans count it
    if launches(new_x) and count:
        strides = [0 if part is None else part.stride(at) for part in (dy, dnew, branch) for at in (0, 1)]
        triton_kernels.backward[(chunks, batch)](
            new_x, dy, dnew, branch, gate, gate_row, scale, scale_row, mean, rstd,
            None if norm == "none" else dx, dbranch if gated else None, partial,
            tokens, new_x.stride(0), new_x.stride(1), *strides, _sample_stride(gate), _sample_stride(scale),
            N=width, MAIN=launch.main, TAIL=launch.tail, ROWS=launch.rows, PASSES=passes, NORM=norm, ONE=one,
            GATED=gated, SUMS=count, num_warps=launch.warps,
        )  # fmt: skip
        add_up(partial.flatten(2), sums)
        if row is not None:
            add_up(sums.flatten(1), row_sums)
    return dx, dbranch, sums, row_sums


_OPERANDS = 8  # of ``forward``, those that are tensors


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, gate_row, _shift, _shift_row, scale, scale_row, _eps, norm, one = inputs
    new_x, _, mean, rstd = output
    gated = gate is not None or gate_row is not None
    ctx.save_for_backward(
        x if branch is None else new_x, branch if gated else None, gate, gate_row, scale, scale_row, mean, rstd
    )
    ctx.dtypes = [None if part is None else part.dtype for part in inputs[:_OPERANDS]]
    ctx.norm, ctx.one = norm, one
    ctx.set_materialize_grads(False)


def _gradients(
    launch: Callable[..., tuple[Tensor, ...]], ctx: Any, dnew: Tensor | None, dy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    """Of all arguments of ``forward``, from those of new_x and y. ``launch``: ``backward``, or the operator of it."""
    if dy is None and dnew is None:
        return (None,) * (_OPERANDS + 3)
    x, branch, gate, gate_row, shift, shift_row, scale, scale_row = ctx.dtypes
    stream, *others = ctx.saved_tensors  # read once: under recomputation a second reading is refused
    dx, dbranch, sums, row_sums = launch(stream, dy, dnew, *others, ctx.norm, ctx.one)
    through_norm = dy is not None and ctx.norm != "none"
    into_x = dx if through_norm else dnew
    into_branch = into_x if gate is None and gate_row is None else dbranch

    def over_samples(at: int) -> Tensor:
        return row_sums[at] if row_sums.numel() else sums[:, at].sum(0, dtype=torch.float32)

    def of(at: int, samples: torch.dtype | None, row: torch.dtype | None) -> list[Tensor | None]:
        return [
            None if samples is None else sums[:, at].to(samples),
            None if row is None else over_samples(at).to(row),
        ]

    return (
        None if into_x is None else into_x.to(x),
        None if branch is None or into_branch is None else into_branch.to(branch),
        *of(-1, gate, gate_row),
        *(of(0, shift, shift_row) if through_norm else (None, None)),
        *(of(1, scale, scale_row) if through_norm else (None, None)),
        None,
        None,
        None,
    )


run = KernelOperator("norm_modulate", forward, backward, _save, _gradients)
