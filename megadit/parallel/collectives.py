"""Collectives of tensor and sequence parallelism, with their gradients. Names are those of Megatron-LM.

==========================================  =============================  ========================================
function                                    forward                        backward
==========================================  =============================  ========================================
copy_to_tensor_parallel_region              --                             all-reduce
reduce_from_tensor_parallel_region          all-reduce                     --
gather_from_tensor_parallel_region          all-gather the last dimension  local part, or (``partial``)
                                                                           reduce-scatter
scatter_to_tensor_parallel_region           local part of the channels     all-gather the last dimension
scatter_to_sequence_parallel_region         local part of the tokens       all-gather the tokens
gather_from_sequence_parallel_region        all-gather the tokens          local part of the tokens
reduce_scatter_to_sequence_parallel_region  reduce-scatter the tokens      all-gather the tokens
==========================================  =============================  ========================================

``partial``: each rank uses the result in its own part of the work, so that the ranks' gradients add up; otherwise all
ranks compute the same from it and have the same gradient. Token streams are (B, T, n). A rank holds ceil(T / ranks)
tokens; where that does not divide, the last ones are padding: zero when made, cut off by every gather, without
gradient.

The ``start_`` functions have no gradients and return at once, so that computation overlaps with the collective until
``wait``. Only ``start_all_reduce`` works in place, on gradients that a backward pass has just made: the operand of the
others may be kept for the backward pass or by selective recomputation.
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
class CollectiveRecorder:
    """Stands for the process group of a ``TensorLayout`` on the meta device: nothing is sent, every call is noted.

    ``calls``: how often a collective of a kind over a whole tensor of so many bytes was called for.
    """

    calls: Counter[tuple[Kind, int]] = field(default_factory=Counter)

    def record(self, kind: Kind, size: int) -> None:
        """A collective over a tensor of ``size`` bytes (see ``ring_bytes``)."""
        self.calls[kind, size] += 1

    def pop_calls(self) -> Counter[tuple[Kind, int]]:
        """The calls since the last time."""
        calls, self.calls = self.calls, Counter()
        return calls


def copy_to_tensor_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, for use in a part of the work each: gradients are summed."""
    out: Tensor = _Copy.apply(x, layout)
    return out


def reduce_from_tensor_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """Sum of all ranks' x, the same on all."""
    out: Tensor = _Sum.apply(x, layout)
    return out


def gather_from_tensor_parallel_region(x: Tensor, layout: TensorLayout, *, partial: bool) -> Tensor:
    """(..., n / ranks) -> (..., n), the ranks' channels one after the other."""
    out: Tensor = _GatherChannels.apply(x, layout, partial)
    return out


def scatter_to_tensor_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """(..., n), the same on all ranks -> this rank's (..., n / ranks)."""
    out: Tensor = _ScatterChannels.apply(x, layout)
    return out


def scatter_to_sequence_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """(B, T, n), the same on all ranks -> this rank's (B, ceil(T / ranks), n)."""
    out: Tensor = _ScatterTokens.apply(x, layout)
    return out


def gather_from_sequence_parallel_region(x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
    """(B, ceil(T / ranks), n) -> (B, T, n) for T ``tokens``, with which all ranks go on alike."""
    out: Tensor = _GatherTokens.apply(x, layout, tokens)
    return out


def reduce_scatter_to_sequence_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """Sum of all ranks' (B, T, n), of which this rank's tokens: (B, ceil(T / ranks), n)."""
    out: Tensor = _SumScatterTokens.apply(x, layout)
    return out


def shared_block_input(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, on its way to all blocks' column-parallel layers (``skip_input_grad_reduce``).

    Each rank's gradient of it is partial in all of them, and is summed here, once. Pipeline stages pass on the parts.
    """
    return copy_to_tensor_parallel_region(x, layout) if layout.size > 1 else x


def scatter_sequence(x: Tensor, layout: TensorLayout) -> Tensor:
    """Where a stream begins: this rank's tokens of (B, T, n) under sequence parallelism, else all."""
    return scatter_to_sequence_parallel_region(x, layout) if layout.sequence else x


def gather_sequence(x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
    """Where a stream ends and all ranks go on alike: its (B, T, n) for T ``tokens``."""
    return gather_from_sequence_parallel_region(x, layout, tokens) if layout.sequence else x


@dataclass
class AsyncCollective:
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


def start_all_reduce(x: Tensor, layout: TensorLayout, *, async_op: bool = True) -> AsyncCollective:
    """Sum of all ranks' x, in place: x, contiguous, must be the caller's alone. Without ``async_op`` it is
    complete on return."""
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("all_reduce", x.nbytes)
        return AsyncCollective(x, None)
    return AsyncCollective(x, dist.all_reduce(x, group=layout.group, async_op=async_op))


def start_all_gather(x: Tensor, layout: TensorLayout, *, async_op: bool = True) -> AsyncCollective:
    """x of every rank, stacked in front: (ranks, *x.shape). Without ``async_op`` it is complete on return."""
    own = x.contiguous()
    out = x.new_empty((layout.size * x.shape[0], *x.shape[1:]))
    stacked = out.view(layout.size, *x.shape)
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("all_gather", out.nbytes)
        return AsyncCollective(stacked, None)
    return AsyncCollective(stacked, dist.all_gather_into_tensor(out, own, group=layout.group, async_op=async_op), own)


def start_reduce_scatter(x: Tensor, layout: TensorLayout) -> AsyncCollective:
    """Sum of all ranks' (n, ...), of which this rank's rows: (n / ranks, ...)."""
    return _start_reduce_scatter(x.unflatten(0, (layout.size, -1)), layout, async_op=True)


def start_reduce_scatter_tokens(x: Tensor, layout: TensorLayout) -> AsyncCollective:
    """As ``reduce_scatter_to_sequence_parallel_region``, without a gradient."""
    return _start_reduce_scatter(_tokens_apart(x, layout), layout, async_op=True)


def _start_reduce_scatter(parts: Tensor, layout: TensorLayout, *, async_op: bool) -> AsyncCollective:
    """Of the sum over ranks of (ranks, ...) the part of this rank."""
    out = parts.new_empty(parts.shape[1:])
    whole = parts.contiguous().flatten(0, 1)
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("reduce_scatter", whole.nbytes)
        return AsyncCollective(out, None)
    return AsyncCollective(out, dist.reduce_scatter_tensor(out, whole, group=layout.group, async_op=async_op), whole)


def _summed(x: Tensor, layout: TensorLayout) -> Tensor:
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), layout, async_op=False).wait()


def _gathered(x: Tensor, layout: TensorLayout) -> Tensor:
    return start_all_gather(x, layout, async_op=False).wait()


def _scattered_sum(parts: Tensor, layout: TensorLayout) -> Tensor:
    return _start_reduce_scatter(parts, layout, async_op=False).wait()


def _tokens_apart(x: Tensor, layout: TensorLayout) -> Tensor:
    """(B, T, n) -> (ranks, B, ceil(T / ranks), n), padded with zeros."""
    missing = -x.shape[1] % layout.size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(1, (layout.size, -1)).transpose(0, 1)


def concat_tokens(parts: Tensor, tokens: int) -> Tensor:
    """(ranks, B, ceil(T / ranks), n) -> (B, T, n), without the padding."""
    return parts.transpose(0, 1).flatten(1, 2)[:, :tokens]


def local_channels(x: Tensor, layout: TensorLayout) -> Tensor:
    """(..., n) -> this rank's (..., n / ranks), a view."""
    return x.unflatten(-1, (layout.size, -1)).select(-2, layout.rank)


def concat_channels(parts: Tensor) -> Tensor:
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
        return concat_channels(_gathered(x, layout))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.unflatten(-1, (ctx.layout.size, -1)).movedim(-2, 0)
        own = _scattered_sum(parts, ctx.layout) if ctx.partial else parts[ctx.layout.rank].contiguous()
        return own, None, None


class _ScatterChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout = layout
        return local_channels(x, layout).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return concat_channels(_gathered(grad, ctx.layout)), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout, ctx.tokens = layout, x.shape[1]
        return _tokens_apart(x, layout)[layout.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return concat_tokens(_gathered(grad, ctx.layout), ctx.tokens), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
        ctx.layout = layout
        return concat_tokens(_gathered(x, layout), tokens)

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
        return concat_tokens(_gathered(grad, ctx.layout), ctx.tokens), None
