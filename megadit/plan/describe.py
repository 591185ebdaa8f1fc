"""What a run will hold and do, in a few lines: for ``--dry_run``."""

from __future__ import annotations

from typing import Any

from torch import nn

from megadit.config import RunConfig
from megadit.parallel.balance import bubble_share
from megadit.plan.flops import forward_flops, stage_flops

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


def parameters_of_stages(config: RunConfig) -> list[int]:
    """Parameters that one rank of each pipeline stage holds, before ZeRO shares them out; built without memory."""
    from megadit.models import build_model
    from megadit.models.segment import build_segment
    from megadit.parallel.balance import balanced_cuts
    from megadit.parallel.tensor import TensorLayout

    parallel = config.parallel
    layout = TensorLayout(parallel.tensor, 0, parallel.sequence) if parallel.tensor > 1 else None
    if parallel.pipeline == 1:
        return [sum(p.numel() for p in build_model(config.model, layout, device="meta").parameters())]
    cuts = balanced_cuts(stage_flops(config.model), parallel.pipeline)
    segments = (build_segment(config.model, cuts, place, layout, device="meta") for place in range(parallel.pipeline))
    return [sum(p.numel() for p in segment.model.parameters()) for segment in segments]


def _layout_line(config: RunConfig, ranks: int, accumulation: int) -> str:
    """``8 rank(s)``, and how they share the model."""
    parallel = config.parallel
    if parallel.tensor * parallel.pipeline == 1:
        return f"{ranks} rank(s)"
    tokens = ", tokens too" if parallel.sequence else ""
    bubble = bubble_share(parallel.pipeline, accumulation)
    waits = f" (stages wait {100 * bubble:.0f}% of a step)" if parallel.pipeline > 1 else ""
    return f"{ranks} rank(s): {parallel.tensor} share a layer{tokens}, {parallel.pipeline} stage(s){waits}"


def describe_plan(config: RunConfig, model: nn.Module, steps: int, ranks: int, ds_config: dict[str, Any]) -> str:
    """Size, layout, memory of the training state and total compute, as aligned lines."""
    parameters = sum(p.numel() for p in model.parameters())
    stage = int(ds_config["zero_optimization"]["stage"])
    shares = parameters_of_stages(config)
    copies = ranks // (config.parallel.tensor * config.parallel.pipeline)
    held = state_bytes(max(shares), copies, stage, config.train.precision, len(config.ema.names))
    accumulation = int(ds_config["gradient_accumulation_steps"])
    memory = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in held.items())
    m = config.model
    compute = 3 * forward_flops(m) * steps * config.train.global_batch
    mup = f"muP, base width {m.base_width}, m = {m.width_mult:g}" if m.parametrization == "mup" else "SP"
    return "\n".join(
        [
            f"model        {m.family} width {m.width}, depth {m.depth}, heads {m.num_heads} x {m.head_channels}, patch "
            f"{m.patch_size}: {parameters:,} trained parameters; {mup}",
            f"layout       {_layout_line(config, ranks, accumulation)}, ZeRO {stage}, {config.train.precision}; batch "
            f"{config.train.global_batch} = {ds_config['train_micro_batch_size_per_gpu']} x {accumulation} accumulated "
            f"x {copies} {'rank(s)' if copies == ranks else 'replica(s) of the model'}",
            f"memory       {memory} GB {'per rank' if len(shares) == 1 else 'on a rank of the fullest stage'} "
            f"({sum(held.values()) / 1e9:.3g} in all, activations not counted)",
            f"length       {steps} steps, {steps * config.train.global_batch:,} images, {compute:.3g} FLOPs",
        ]
    )
