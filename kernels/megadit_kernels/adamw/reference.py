"""AdamW in plain torch: what the fused kernel computes, in the precision of the masters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Operands of an update of one buffer of masters; all but ``step`` and ``scale`` lie contiguous in memory.

    master, exp_avg, exp_avg_sq: of the same size, written in place.  step: () float32, updates made so far.
    gradients: of the master's elements in their order, one after the other; elements behind their end stay as they are.
    scale: () float32, a factor of the gradients (loss scale and clipping); None: 1.
    copy: receives the new master, rounded to its own type; None where nothing does.
    """

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    gradients: tuple[Tensor, ...]
    lr: float
    weight_decay: float
    eps: float
    scale: Tensor | None = None
    copy: Tensor | None = None


@torch.no_grad()
def update(shards: Sequence[Shard], betas: tuple[float, float], gate: Tensor | None = None) -> list[Tensor]:
    """Update the shards in place; returns the step counters after it, each () float32.

    gate: () float32; where it is not 0 nothing changes, copies and counters included.

    Decay is decoupled (Loshchilov & Hutter, arXiv 1711.05101) and multiplied by the learning rate, and eps is added
    behind the square root and its bias correction, as in ``torch.optim.AdamW``.
    """
    if gate is not None and bool(gate):
        return [shard.step for shard in shards]
    beta1, beta2 = betas
    for shard in shards:
        gradient = torch.cat([part.reshape(-1).to(shard.master.dtype) for part in shard.gradients])
        if shard.scale is not None:
            gradient = gradient * shard.scale
        master, exp_avg, exp_avg_sq = (
            buffer.view(-1)[: len(gradient)] for buffer in (shard.master, shard.exp_avg, shard.exp_avg_sq)
        )
        count = float(shard.step) + 1
        exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**count) ** 0.5).add_(shard.eps)
        master.mul_(1 - shard.lr * shard.weight_decay).addcdiv_(
            exp_avg, denominator, value=-shard.lr / (1 - beta1**count)
        )
        if shard.copy is not None:
            shard.copy.view(-1)[: len(gradient)].copy_(master)
    return [shard.step + 1 for shard in shards]
