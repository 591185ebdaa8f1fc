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

While torch.compile traces, each is torch's operator of the same name (``_c10d_functional``), which a graph can hold,
and ``wait`` another: what stands between start and wait in the eager code stands between them in the graph.
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

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]


def ring_bytes(kind: CollectiveKind, size: int, ranks: int) -> float:
    """Least bytes that each of ``ranks`` ranks sends in a collective over a whole tensor of ``size`` bytes.

    ``size``: of the larger side, before a reduction or after a gather. An all-reduce costs as much as both others
    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009).
    """
    return size * (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)


@dataclass
class CollectiveRecorder:
    """In place of the process group of a ``TensorLayout``, for the meta device: records collectives and sends nothing.

    calls: number of collectives by kind and bytes of the whole tensor (the ``size`` of ``ring_bytes``).
    """

    calls: Counter[tuple[CollectiveKind, int]] = field(default_factory=Counter)

    def record(self, kind: CollectiveKind, size: int) -> None:
        """Count a collective over a whole tensor of ``size`` bytes."""
        self.calls[kind, size] += 1

    def pop_calls(self) -> Counter[tuple[CollectiveKind, int]]:
        """The calls since the last ``pop_calls``."""
        calls, self.calls = self.calls, Counter()
        return calls


def copy_to_tensor_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, before tensor-parallel work on it: its gradients are all-reduced."""
    return _apply(_CopyToRegion, x, layout)


def reduce_from_tensor_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """Sum of all ranks' x, the same on all."""
    return _apply(_Reduce, x, layout)


def gather_from_tensor_parallel_region(x: Tensor, layout: TensorLayout, *, partial: bool) -> Tensor:
    """(..., n / ranks) -> (..., n), the channels of all ranks in order."""
    return _apply(_GatherChannels, x, layout, partial)


def scatter_to_tensor_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """(..., n), the same on all ranks -> this rank's (..., n / ranks)."""
    return _apply(_ScatterChannels, x, layout)


def scatter_to_sequence_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """(B, T, n), the same on all ranks -> this rank's (B, ceil(T / ranks), n)."""
    return _apply(_ScatterTokens, x, layout)


def gather_from_sequence_parallel_region(x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
    """(B, ceil(T / ranks), n) -> (B, T, n) for T ``tokens``, from which all ranks compute the same."""
    return _apply(_GatherTokens, x, layout, tokens)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, layout: TensorLayout) -> Tensor:
    """This rank's tokens (B, ceil(T / ranks), n) of the sum of all ranks' (B, T, n)."""
    return _apply(_ReduceScatterTokens, x, layout)


def shared_block_input(x: Tensor, layout: TensorLayout) -> Tensor:
    """x, the same on all ranks, an input of all blocks' column-parallel layers (with ``skip_input_grad_reduce``).

    The layers leave its gradient partial on each rank, and it is all-reduced here, once; pipeline stages pass back
    the partial gradients.
    """
    return copy_to_tensor_parallel_region(x, layout) if layout.size > 1 else x


def scatter_sequence(x: Tensor, layout: TensorLayout) -> Tensor:
    """At the start of a token stream (B, T, n): this rank's tokens under sequence parallelism, else x."""
    return scatter_to_sequence_parallel_region(x, layout) if layout.sequence else x


def gather_sequence(x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
    """At the end of a token stream: (B, T, n) for T ``tokens`` on all ranks."""
    return gather_from_sequence_parallel_region(x, layout, tokens) if layout.sequence else x


@dataclass
class AsyncCollective:
    """A running collective: ``value`` may be read only after ``wait``, and ``operand`` not be changed before.

    work: torch's handle; None if the collective is complete, or an operator of the graph that torch.compile traces.
    shape: in which ``wait`` returns ``value``; None: its own.
    """

    value: Tensor
    work: Any
    operand: Tensor | None = None
    shape: tuple[int, ...] | None = None

    def wait(self) -> Tensor:
        """Wait for the collective; returns its result."""
        if torch.compiler.is_compiling():
            value: Tensor = torch.ops._c10d_functional.wait_tensor(self.value)
        else:
            value = self.value
            if self.work is not None:
                self.work.wait()
            self.work = self.operand = None
        return value if self.shape is None else value.view(self.shape)


def start_all_reduce(x: Tensor, layout: TensorLayout, *, async_op: bool = True) -> AsyncCollective:
    """Sum of all ranks' x, in place; x must be contiguous and used by nothing else. Without ``async_op`` it is
    complete on return."""
    if torch.compiler.is_compiling():
        return AsyncCollective(torch.ops._c10d_functional.all_reduce(x, "sum", layout.group_name), None)
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("all_reduce", x.nbytes)
        return AsyncCollective(x, None)
    return AsyncCollective(x, dist.all_reduce(x, group=layout.group, async_op=async_op))


def all_reduce_max(x: Tensor, layout: TensorLayout) -> Tensor:
    """Elementwise maximum of all ranks' x, in place and without a gradient; x must be contiguous."""
    if torch.compiler.is_compiling():
        value: Tensor = torch.ops._c10d_functional.all_reduce(x, "max", layout.group_name)
        return AsyncCollective(value, None).wait()
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("all_reduce", x.nbytes)
    else:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=layout.group)
    return x


def start_all_gather(x: Tensor, layout: TensorLayout, *, async_op: bool = True) -> AsyncCollective:
    """All ranks' x, stacked: (ranks, *x.shape). Without ``async_op`` it is complete on return."""
    operand = x.contiguous()
    shape = (layout.size, *x.shape)
    if torch.compiler.is_compiling():
        gather = torch.ops._c10d_functional.all_gather_into_tensor
        return AsyncCollective(gather(operand, layout.size, layout.group_name), None, shape=shape)
    out = x.new_empty((layout.size * x.shape[0], *x.shape[1:]))
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("all_gather", out.nbytes)
        return AsyncCollective(out, None, shape=shape)
    work = dist.all_gather_into_tensor(out, operand, group=layout.group, async_op=async_op)
    return AsyncCollective(out, work, operand, shape)


def start_reduce_scatter(x: Tensor, layout: TensorLayout) -> AsyncCollective:
    """This rank's rows (n / ranks, ...) of the sum of all ranks' (n, ...)."""
    return _start_reduce_scatter(x.unflatten(0, (layout.size, -1)), layout, async_op=True)


def start_reduce_scatter_tokens(x: Tensor, layout: TensorLayout) -> AsyncCollective:
    """As ``reduce_scatter_to_sequence_parallel_region``, without a gradient."""
    return _start_reduce_scatter(_split_tokens(x, layout), layout, async_op=True)


def _start_reduce_scatter(parts: Tensor, layout: TensorLayout, *, async_op: bool) -> AsyncCollective:
    """This rank's part (...) of the sum over ranks of (ranks, ...)."""
    operand = parts.contiguous().flatten(0, 1)
    if torch.compiler.is_compiling():
        scatter = torch.ops._c10d_functional.reduce_scatter_tensor
        part = scatter(operand, "sum", layout.size, layout.group_name)
        return AsyncCollective(part, None, shape=parts.shape[1:])
    out = parts.new_empty(parts.shape[1:])
    if isinstance(layout.group, CollectiveRecorder):
        layout.group.record("reduce_scatter", operand.nbytes)
        return AsyncCollective(out, None)
    return AsyncCollective(
        out, dist.reduce_scatter_tensor(out, operand, group=layout.group, async_op=async_op), operand
    )


def _all_reduce(x: Tensor, layout: TensorLayout) -> Tensor:
    return start_all_reduce(x.clone(memory_format=torch.contiguous_format), layout, async_op=False).wait()


def _all_gather(x: Tensor, layout: TensorLayout) -> Tensor:
    return start_all_gather(x, layout, async_op=False).wait()


def _reduce_scatter(parts: Tensor, layout: TensorLayout) -> Tensor:
    return _start_reduce_scatter(parts, layout, async_op=False).wait()


def _split_tokens(x: Tensor, layout: TensorLayout) -> Tensor:
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


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout = layout
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.layout), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        return _all_reduce(x, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout, partial: bool) -> Tensor:
        ctx.layout, ctx.partial = layout, partial
        return concat_channels(_all_gather(x, layout))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.unflatten(-1, (ctx.layout.size, -1)).movedim(-2, 0)
        local = _reduce_scatter(parts, ctx.layout) if ctx.partial else parts[ctx.layout.rank].contiguous()
        return local, None, None


class _ScatterChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout = layout
        return local_channels(x, layout).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return concat_channels(_all_gather(grad, ctx.layout)), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout, ctx.tokens = layout, x.shape[1]
        return _split_tokens(x, layout)[layout.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return concat_tokens(_all_gather(grad, ctx.layout), ctx.tokens), None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout, tokens: int) -> Tensor:
        ctx.layout = layout
        return concat_tokens(_all_gather(x, layout), tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _split_tokens(grad, ctx.layout)[ctx.layout.rank].contiguous(), None, None


class _ReduceScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: TensorLayout) -> Tensor:
        ctx.layout, ctx.tokens = layout, x.shape[1]
        return _reduce_scatter(_split_tokens(x, layout), layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return concat_tokens(_all_gather(grad, ctx.layout), ctx.tokens), None
