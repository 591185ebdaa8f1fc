"""What a run will hold and do, in a few lines: for ``--dry_run``."""

from __future__ import annotations

from typing import Any

from torch import nn

from megadit.config import RunConfig
from megadit.plan.flops import forward_flops

_FULL = 4  # bytes of float32


def state_bytes(parameters: int, ranks: int, zero_stage: int, precision: str, averages: int) -> dict[str, float]:
    """Bytes per rank of weights, gradients, optimizer (fp32 masters and two moments) and averages under ZeRO.

    Stage 1 shards optimizer and averages, stage 2 gradients too, stage 3 also the weights (Rajbhandari et al. 2020).
    At stage 0 in float32 the weights are their own masters. Activations are not counted.
    """
    working = _FULL if precision == "fp32" else 2
    masters = 0 if zero_stage == 0 and precision == "fp32" else _FULL
    held = {
        "weights": parameters * working / (ranks if zero_stage == 3 else 1),
        "gradients": parameters * working / (ranks if zero_stage >= 2 else 1),
        "optimizer": parameters * (2 * _FULL + masters) / (ranks if zero_stage >= 1 else 1),
    }
    if averages:
        held["averages"] = averages * parameters * _FULL / (ranks if zero_stage >= 1 else 1)
    return held


def describe_plan(config: RunConfig, model: nn.Module, steps: int, ranks: int, ds_config: dict[str, Any]) -> str:
    """Size, layout, memory of the training state and total compute, as aligned lines."""
    parameters = sum(p.numel() for p in model.parameters())
    stage = int(ds_config["zero_optimization"]["stage"])
    held = state_bytes(parameters, ranks, stage, config.train.precision, len(config.ema.names))
    memory = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in held.items())
    m = config.model
    compute = 3 * forward_flops(m) * steps * config.train.global_batch
    mup = f"muP, base width {m.base_width}, m = {m.width_mult:g}" if m.parametrization == "mup" else "SP"
    return "\n".join(
        [
            f"model        {m.family} width {m.width}, depth {m.depth}, heads {m.num_heads} x {m.head_channels}, patch "
            f"{m.patch_size}: {parameters:,} trained parameters; {mup}",
            f"layout       {ranks} rank(s), ZeRO {stage}, {config.train.precision}; batch {config.train.global_batch} "
            f"= {ds_config['train_micro_batch_size_per_gpu']} x {ds_config['gradient_accumulation_steps']} accumulated "
            f"x {ranks} rank(s)",
            f"memory       {memory} GB per rank ({sum(held.values()) / 1e9:.3g} in all, activations not counted)",
            f"length       {steps} steps, {steps * config.train.global_batch:,} images, {compute:.3g} FLOPs",
        ]
    )
