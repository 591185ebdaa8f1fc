"""Collectives of tensor and sequence parallelism, with their gradients.

Each function names what it does to the values; what it does to gradients follows from who uses the result:

=======================  ==============================  ===========================================
function                 forward                         backward
=======================  ==============================  ===========================================
copy_to_ranks            --                              sum over ranks
sum_over_ranks           sum over ranks                  --
gather_channels          all-gather the last dimension   this rank's part, or (``partial``) of the sum
scatter_channels         this rank's channels            all-gather the last dimension
scatter_tokens           this rank's tokens              all-gather tokens
gather_tokens            all-gather tokens               this rank's part
sum_and_scatter_tokens   sum, of which its own tokens    all-gather tokens
=======================  ==============================  ===========================================

``partial`` says that each rank goes on with a part of the work, so that their gradients add up; otherwise all ranks do
the same and have the same gradient. Token streams are (B, T, n). A rank holds ceil(T / ranks) tokens; where that does
not divide, the last ones are padding, zero when made, cut off whenever tokens are gathered, and without gradient.

The ``begin_`` functions have no gradients, and return at once: what is computed before their result is waited for is
computed while the ranks exchange. Nothing is summed in place, since the operand may be kept for the backward pass, or
by selective recomputation; but for ``begin_sum``, which is for what a backward pass has just made.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megadit.parallel.tensor import TensorLayout

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


def ring_bytes(kind: Kind, size: int, ranks: int) -> float:
    """Bytes that each of ``ranks`` ranks sends, at least, for a collective over a whole tensor of ``size`` bytes.

    ``size`` is that of the larger side: what is summed, gathered, or scattered. A sum costs both of the others
    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009).
    """
    return size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


@dataclass
class Rehearsal:
    """Stands for the process group of a ``TensorLayout`` on the meta device: nothing is sent, every call is noted.

    ``calls``: how often a collective of a kind over a whole tensor of so many bytes was called for.
    """

    calls: Counter[tuple[Kind, int]] = field(default_factory=Counter)

    def note(self, kind: Kind, size: int) -> None:
        """A collective over a tensor of ``size`` bytes (see ``ring_bytes``)."""
        self.calls[kind, size] += 1

    def taken(self) -> Counter[tuple[Kind, int]]:
        """The calls since the last time."""
        calls, self.calls = self.calls, Counter()
        return calls


def copy_to_ranks(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, for use in a part of the work each: gradients are summed."""
    out: Tensor = _Copy.apply(x, layout)
    return out


def sum_over_ranks(x: Tensor, layout: TensorLayout) -> Tensor:
    """Sum of all ranks' x, the same on all."""
    out: Tensor = _Sum.apply(x, layout)
    return out


def gather_channels(x: Tensor, layout: TensorLayout, *, partial: bool) -> Tensor:
    """(..., n / ranks) -> (..., n), the ranks' channels one after the other."""
    out: Tensor = _GatherChannels.apply(x, layout, partial)
    return out


def scatter_channels(x: Tensor, layout: TensorLayout) -> Tensor:
    """(..., n), the same on all ranks -> this rank's (..., n / ranks)."""
    out: Tensor = _ScatterChannels.apply(x, layout)
    return out


def scatter_tokens(x: Tensor, layout: TensorLayout) -> Tensor:
    """(B, T, n), the same on all ranks -> this rank's (B, ceil(T / ranks), n)."""
    out: Tensor = _ScatterTokens.apply(x, layout)
    return out


def gather_tokens(x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
    """(B, ceil(T / ranks), n) -> (B, T, n) for T ``tokens``, with which all ranks go on alike."""
    out: Tensor = _GatherTokens.apply(x, layout, tokens)
    return out


def sum_and_scatter_tokens(x: Tensor, layout: TensorLayout) -> Tensor:
    """Sum of all ranks' (B, T, n), of which this rank's tokens: (B, ceil(T / ranks), n)."""
    out: Tensor = _SumScatterTokens.apply(x, layout)
    return out


def enter_blocks(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, on its way to all blocks' column-parallel layers (``skip_input_grad_reduce``).

    Each rank's gradient of it is partial in all of them, and is summed here, once. A pipeline's wire carries the parts.
    """
    return copy_to_ranks(x, layout) if layout.size > 1 else x


def own_tokens(x: Tensor, layout: TensorLayout) -> Tensor:
    """Where a stream begins: this rank's tokens of (B, T, n) under sequence parallelism, else all."""
    return scatter_tokens(x, layout) if layout.sequence else x


def all_tokens(x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
    """Where a stream ends and all ranks go on alike: its (B, T, n) for T ``tokens``."""
    return gather_tokens(x, layout, tokens) if layout.sequence else x


@dataclass
class Pending:
    """A collective under way. ``value`` may be read after ``wait`` only, ``operand`` not be changed before.

    ``work``: torch's handle; None where nothing is to wait for.
    """

    value: Tensor
    work: Any
    operand: Tensor | None = None

    def wait(self) -> Tensor:
        """The result, once it is there."""
        if self.work is not None:
            self.work.wait()
        self.work = self.operand = None
        return self.value


def begin_sum(x: Tensor, layout: TensorLayout, *, later: bool = True) -> Pending:
    """Sum of all ranks' x, in place: x, contiguous, must be the caller's alone. Not ``later``: done on return."""
    if isinstance(layout.group, Rehearsal):
        layout.group.note("all_reduce", x.nbytes)
        return Pending(x, None)
    return Pending(x, dist.all_reduce(x, group=layout.group, async_op=later))


def begin_gather(x: Tensor, layout: TensorLayout, *, later: bool = True) -> Pending:
    """x of every rank, stacked in front: (ranks, *x.shape). Not ``later``: there on return."""
    own = x.contiguous()
    out = x.new_empty((layout.size * x.shape[0], *x.shape[1:]))
    stacked = out.view(layout.size, *x.shape)
    if isinstance(layout.group, Rehearsal):
        layout.group.note("all_gather", out.nbytes)
        return Pending(stacked, None)
    return Pending(stacked, dist.all_gather_into_tensor(out, own, group=layout.group, async_op=later), own)


def begin_sum_and_scatter_rows(x: Tensor, layout: TensorLayout) -> Pending:
    """Sum of all ranks' (n, ...), of which this rank's rows: (n / ranks, ...)."""
    return _begin_scattered_sum(x.unflatten(0, (layout.size, -1)), layout, later=True)


def begin_sum_and_scatter_tokens(x: Tensor, layout: TensorLayout) -> Pending:
    """As ``sum_and_scatter_tokens``, without a gradient."""
    return _begin_scattered_sum(_tokens_apart(x, layout), layout, later=True)


def _begin_scattered_sum(parts: Tensor, layout: TensorLayout, *, later: bool) -> Pending:
    """Of the sum over ranks of (ranks, ...) the part of this rank."""
    out = parts.new_empty(parts.shape[1:])
    whole = parts.contiguous().flatten(0, 1)
    if isinstance(layout.group, Rehearsal):
        layout.group.note("reduce_scatter", whole.nbytes)
        return Pending(out, None)
    return Pending(out, dist.reduce_scatter_tensor(out, whole, group=layout.group, async_op=later), whole)


def _summed(x: Tensor, layout: TensorLayout) -> Tensor:
    return begin_sum(x.clone(memory_format=torch.contiguous_format), layout, later=False).wait()


def _gathered(x: Tensor, layout: TensorLayout) -> Tensor:
    return begin_gather(x, layout, later=False).wait()


def _scattered_sum(parts: Tensor, layout: TensorLayout) -> Tensor:
    return _begin_scattered_sum(parts, layout, later=False).wait()


def _tokens_apart(x: Tensor, layout: TensorLayout) -> Tensor:
    """(B, T, n) -> (ranks, B, ceil(T / ranks), n), padded with zeros."""
    missing = -x.shape[1] % layout.size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(1, (layout.size, -1)).transpose(0, 1)


def tokens_together(parts: Tensor, tokens: int) -> Tensor:
    """(ranks, B, ceil(T / ranks), n) -> (B, T, n), without the padding."""
    return parts.transpose(0, 1).flatten(1, 2)[:, :tokens]


def own_channels(x: Tensor, layout: TensorLayout) -> Tensor:
    """(..., n) -> this rank's (..., n / ranks), a view."""
    return x.unflatten(-1, (layout.size, -1)).select(-2, layout.rank)


def channels_together(parts: Tensor) -> Tensor:
    """(ranks, ..., n / ranks) -> (..., n)."""
    return parts.movedim(0, -2).flatten(-2)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.layout), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        return _summed(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout, partial: bool) -> Tensor:
        ctx.layout, ctx.partial = layout, partial
        return channels_together(_gathered(x, layout))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.unflatten(-1, (ctx.layout.size, -1)).movedim(-2, 0)
        own = _scattered_sum(parts, ctx.layout) if ctx.partial else parts[ctx.layout.rank].contiguous()
        return own, None, None


class _ScatterChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout = layout
        return own_channels(x, layout).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return channels_together(_gathered(grad, ctx.layout)), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout, ctx.tokens = layout, x.shape[1]
        return _tokens_apart(x, layout)[layout.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return tokens_together(_gathered(grad, ctx.layout), ctx.tokens), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
        ctx.layout = layout
        return tokens_together(_gathered(x, layout), tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _tokens_apart(grad, ctx.layout)[ctx.layout.rank].contiguous(), None, None


class _SumScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout, ctx.tokens = layout, x.shape[1]
        return _scattered_sum(_tokens_apart(x, layout), layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return tokens_together(_gathered(grad, ctx.layout), ctx.tokens), None
