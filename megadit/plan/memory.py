"""What a rank holds: its share of the training state under ZeRO, and what forward and backward hold besides.

The latter is counted on the meta device, on which the two run without memory.
No formula of a block can be forgotten when the block changes: the model itself runs, sharded as it would be, and every
tensor that it makes is counted from its making to its end. Attention counts as one fused operation, which keeps
its operands, its result and one number per query and head, as on the devices that such models are trained on. Counted
are the bytes that tensors ask for; an allocator's rounding and fragments, and the workspaces of libraries, are not.
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
from megadit.models.chunk import ModelChunk, build_chunk
from megadit.models.stages import StageIO
from megadit.mup.example import example_conditioning
from megadit.parallel.collectives import CollectiveRecorder, Kind
from megadit.parallel.recompute import Recompute
from megadit.parallel.tensor import TensorLayout

_FULL = 4  # bytes of float32


class LiveByteCounter(TorchDispatchMode):
    """Counts the bytes of all storages that were made inside and are still alive: ``now``, and at most ``peak``.

    Those of ``known`` tensors (weights, gradients) count nothing.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in known:
            self._follow(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and follow what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._follow(storage, storage.nbytes())
        return out

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention as one operation, of which the meta device has none: it would make, and keep, all scores.

    torch's function is replaced for the time: a mode would not reach the recomputation inside of a backward pass.
    """
    own = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


def _fused(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask)[0]
    return out


@dataclass(frozen=True)
class MicroBatchCost:
    """One micro batch through one pipeline stage, on one rank; all in bytes.

    kept: from its forward pass until its backward pass. peak: the most that is held during the two, ``kept`` included;
    weights and gradients of weights are not. wire_in, wire_out: what comes from the stage before, and goes to the one
    behind (0 at the ends); the backward pass sends as much back, but for integers: ``wire_back`` to the stage before.
    """

    kept: int
    peak: int
    wire_in: int
    wire_out: int
    wire_back: int
    forward: Counter[tuple[Kind, int]]
    backward: Counter[tuple[Kind, int]]


def stage_costs(
    config: ModelConfig,
    cuts: Sequence[int],
    batch: int,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "none",
    tensor: int = 1,
    *,
    sequence: bool = False,
) -> Iterator[tuple[ModelChunk, MicroBatchCost]]:
    """Every chunk of a model cut at ``cuts``, on the meta device as one of ``tensor`` ranks holds it, and what
    ``batch`` images cost it. The text comes with its mask.
    """
    recorder = CollectiveRecorder()
    layout = TensorLayout(tensor, 0, sequence, recorder) if tensor > 1 else None
    wire: StageIO = ()
    for place in range(len(cuts) - 1):
        chunk = build_chunk(config, cuts, place, layout, device="meta")
        chunk.model.to(dtype)
        chunk.model.recompute = recompute
        chunk.project = config.repa is not None
        if not place:
            x = torch.empty(batch, config.in_channels, config.input_size, config.input_size, device="meta")
            cond = example_conditioning(config, [0]).repeat(batch).to("meta")
            wire = chunk.model.packed_inputs(x, torch.empty(batch, device="meta"), cond)
        passage, wire = _pass(chunk, wire, recorder, first=place == 0)
        yield chunk, passage


def _pass(
    chunk: ModelChunk, wire: StageIO, recorder: CollectiveRecorder, *, first: bool
) -> tuple[MicroBatchCost, StageIO]:
    known = [*chunk.parameters(), *chunk.buffers()]
    for p in chunk.parameters():
        p.grad = torch.empty_like(p)  # from the second micro batch on a gradient is added to
        known.append(p.grad)
    recorder.pop_calls()
    with LiveByteCounter(known) as live, fused_attention():
        inputs = tuple(torch.empty_like(part) for part in wire)
        if not first:
            for part in inputs:
                part.requires_grad_(part.is_floating_point())
        out = chunk(inputs)
        outputs = (out,) if isinstance(out, Tensor) else tuple(out)
        del out
        kept, forward = live.now, recorder.pop_calls()
        moving = [part for part in outputs if part.requires_grad]
        torch.autograd.backward(moving, [torch.empty_like(part) for part in moving])
        backward = recorder.pop_calls()
        peak = live.peak
    last = chunk.is_last
    passage = MicroBatchCost(
        kept=kept,
        peak=peak,
        wire_in=0 if first else sum(part.nbytes for part in wire),
        wire_out=0 if last else sum(part.nbytes for part in outputs),
        wire_back=0 if first else sum(part.nbytes for part in wire if part.is_floating_point()),
        forward=forward,
        backward=backward,
    )
    return passage, tuple(torch.empty_like(part.detach()) for part in outputs)


def state_bytes(
    parameters: int, ranks: int, zero_stage: int, precision: str, averages: int, gradient: int | None = None
) -> dict[str, float]:
    """Bytes per rank of weights, gradients, optimizer (fp32 masters and two moments) and averages under ZeRO.

    Stage 1 shards optimizer and averages, stage 2 gradients too, stage 3 also the weights (Rajbhandari et al. 2020).
    At stage 0 in float32 the weights are their own masters. ``gradient``: bytes of an element of the gradients as they
    are added up, None for those of the weights; where these differ, a micro batch's own live until they are added.
    Activations are not counted.
    """
    working = _FULL if precision == "fp32" else 2
    masters = 0 if zero_stage == 0 and precision == "fp32" else _FULL
    held = {
        "weights": parameters * working / (ranks if zero_stage == 3 else 1),
        "gradients": parameters * (gradient or working) / (ranks if zero_stage >= 2 else 1),
        "optimizer": parameters * (2 * _FULL + masters) / (ranks if zero_stage >= 1 else 1),
    }
    if averages:
        held["averages"] = averages * parameters * _FULL / (ranks if zero_stage >= 1 else 1)
    return held
