"""Memory of a rank: its shard of the training state under ZeRO, and the activations of forward and backward pass.

Activations are counted on the meta device, on which the passes run without memory: the model itself runs, sharded as it
would be, and every tensor is counted from its allocation until it is freed, so that no formula has to follow changes of
a block. Attention counts as one fused operation, which saves its operands, its result and one number per query and
head, as on the devices that such models are trained on. Counted are the bytes that tensors ask for, without an
allocator's rounding and fragmentation and the workspaces of libraries.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadit.config import ModelConfig
from megadit.config.schema.float8 import Float8Config
from megadit.models.chunk import ModelChunk, build_chunk
from megadit.models.float8 import set_float8
from megadit.models.stages import StageIO
from megadit.mup.example import example_conditioning
from megadit.parallel.collectives import CollectiveKind, CollectiveRecorder
from megadit.parallel.recompute import Recompute
from megadit.parallel.tensor import TensorLayout

_FLOAT32_BYTES = 4


class LiveByteCounter(TorchDispatchMode):
    """Counts the bytes of storages that are allocated inside and not yet freed: ``now``, and their maximum ``peak``.

    The storages of ``known`` tensors (weights, gradients) are left out.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._track(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that it allocates."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._track(storage, storage.nbytes())
        return out

    def _track(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def freed(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as one operation inside the block. The meta device has none: it would allocate and save all scores.

    torch's function is replaced: a dispatch mode would not reach the recomputation within a backward pass.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]
    return out


@dataclass(frozen=True)
class MicroBatchCost:
    """Bytes of one micro batch in one pipeline stage, on one rank.

    saved_bytes: activations from its forward pass until its backward pass.  peak_bytes: the most that is allocated
    during the two, ``saved_bytes`` included, weights and their gradients not.  input_bytes, output_bytes: received from
    the previous stage and sent to the next, 0 at the ends.  input_grad_bytes: sent back to the previous stage, as much
    as was received but for integers.  forward, backward: collectives by kind and bytes of the whole tensor.
    """

    saved_bytes: int
    peak_bytes: int
    input_bytes: int
    output_bytes: int
    input_grad_bytes: int
    forward: Counter[tuple[CollectiveKind, int]]
    backward: Counter[tuple[CollectiveKind, int]]


def stage_costs(
    config: ModelConfig,
    cuts: Sequence[int],
    batch: int,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    tensor: int = 1,
    *,
    sequence: bool = False,
    residual_across_blocks: bool = False,
    fp8: Float8Config | None = None,
) -> Iterator[tuple[ModelChunk, MicroBatchCost]]:
    """Every chunk of a model cut at ``cuts``, on the meta device as one of ``tensor`` ranks holds it, and the cost of a
    micro batch of ``batch`` images in it. The text comes with its mask. ``fp8``: its linear layers multiply in FP8;
    those of transformer-engine, which no meta device runs, are counted as in bf16.
    """
    recorder = CollectiveRecorder()
    layout = TensorLayout(tensor, 0, sequence, recorder) if tensor > 1 else None
    stage_io: StageIO = ()
    for stage in range(len(cuts) - 1):
        chunk = build_chunk(config, cuts, stage, layout, device="meta")
        chunk.model.to(dtype)
        chunk.model.recompute, chunk.model.residual_across_blocks = recompute, residual_across_blocks
        chunk.project = config.repa is not None
        if fp8 is not None and fp8.backend == "torch":
            set_float8(chunk.model, fp8)
        if stage == 0:
            x = torch.empty(batch, config.in_channels, config.input_size, config.input_size, device="meta")
            cond = example_conditioning(config, [0]).repeat(batch).to("meta")
            stage_io = chunk.model.packed_inputs(x, torch.empty(batch, device="meta"), cond)
        cost, stage_io = _run_chunk(chunk, stage_io, recorder)
        yield chunk, cost


def _run_chunk(chunk: ModelChunk, stage_io: StageIO, recorder: CollectiveRecorder) -> tuple[MicroBatchCost, StageIO]:
    """Forward and backward pass of the second micro batch of a step; returns its cost and the next stage's input."""
    known = [*chunk.parameters(), *chunk.buffers()]
    for p in chunk.parameters():
        p.grad = torch.empty_like(p)  # the first micro batch left one, to which is added
        known.append(p.grad)
    recorder.pop_calls()
    with LiveByteCounter(known) as live, fused_attention():
        inputs = tuple(torch.empty_like(part) for part in stage_io)
        if not chunk.is_first:
            for part in inputs:
                part.requires_grad_(part.is_floating_point())
        out = chunk(inputs)
        outputs = (out,) if isinstance(out, Tensor) else tuple(out)
        del out
        saved, forward = live.now, recorder.pop_calls()
        differentiable = [part for part in outputs if part.requires_grad]
        torch.autograd.backward(differentiable, [torch.empty_like(part) for part in differentiable])
        backward = recorder.pop_calls()
        peak = live.peak
    received = () if chunk.is_first else stage_io
    cost = MicroBatchCost(
        saved_bytes=saved,
        peak_bytes=peak,
        input_bytes=sum(part.nbytes for part in received),
        output_bytes=0 if chunk.is_last else sum(part.nbytes for part in outputs),
        input_grad_bytes=sum(part.nbytes for part in received if part.is_floating_point()),
        forward=forward,
        backward=backward,
    )
    return cost, tuple(torch.empty_like(part.detach()) for part in outputs)


def state_bytes(
    parameters: int, ranks: int, zero_stage: int, precision: str, averages: int, gradient: int | None = None
) -> dict[str, float]:
    """Bytes per rank of weights, gradients, optimizer state (fp32 masters, two moments) and averages under ZeRO.

    Stage 1 shards optimizer state and averages, stage 2 gradients too, stage 3 also the weights (Rajbhandari et al.
    2020). At stage 0 in float32 the weights are their own masters. Activations are not counted.

    parameters: of the rank's pipeline stage and tensor-parallel shard.  ranks: data-parallel.  gradient: bytes per
    element of the accumulated gradients, None for those of the weights; where the two differ, a micro batch's own
    gradients live until they are added.
    """
    working = _FLOAT32_BYTES if precision == "fp32" else 2
    masters = 0 if zero_stage == 0 and precision == "fp32" else _FLOAT32_BYTES
    state = {
        "weights": parameters * working / (ranks if zero_stage == 3 else 1),
        "gradients": parameters * (gradient or working) / (ranks if zero_stage >= 2 else 1),
        "optimizer": parameters * (2 * _FLOAT32_BYTES + masters) / (ranks if zero_stage >= 1 else 1),
    }
    if averages:
        state["averages"] = averages * parameters * _FLOAT32_BYTES / (ranks if zero_stage >= 1 else 1)
    return state
