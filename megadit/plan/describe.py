"""What a run will hold and do, in a few lines: for ``--dry_run``."""

from __future__ import annotations

from typing import Any

from torch import nn

from megadit.config import RunConfig
from megadit.plan.flops import forward_flops
from megadit.plan.layout import LayoutPlan, plan_layout, table


def describe_plan(
    config: RunConfig, model: nn.Module, steps: int | None, ranks: int, ds_config: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Size, layout, memory and total compute, as aligned lines with a table of the stages, and as plain values.

    steps: None where the length of the run depends on data that are not there.
    """
    parameters = sum(p.numel() for p in model.parameters())
    plan = plan_layout(config, ranks, ds_config, parameters)
    m, batch = config.model, config.train.global_batch
    step_flops = 3 * forward_flops(m) * batch
    mup = f"muP, base width {m.base_width}, m = {m.width_mult:g}" if m.parametrization == "mup" else "SP"
    length = "known once the data are there" if steps is None else _length(steps, batch, step_flops)
    text = "\n".join(
        [
            f"model        {m.family} width {m.width}, depth {m.depth}, heads {m.num_heads} x {m.head_channels}, patch "
            f"{m.patch_size}: {parameters:,} trained parameters; {mup}",
            f"layout       {_layout_line(plan)}, ZeRO {plan.zero_stage}, {config.train.precision}; batch {batch} = "
            f"{plan.micro_batch} x {plan.micro_batches} accumulated x {plan.data} "
            f"{'rank(s)' if plan.data == ranks else 'replica(s) of the model'}",
            f"memory       {_memory_line(plan)}",
            f"length       {length}",
            "",
            table(plan),
            "",
        ]
    )
    facts = {"model_flops_per_step": step_flops, "steps": steps, "precision": config.train.precision}
    return text, plan.as_json() | facts


def _length(steps: int, batch: int, step_flops: int) -> str:
    return f"{steps} steps, {steps * batch:,} images, {step_flops * steps:.3g} FLOPs"


def _layout_line(plan: LayoutPlan) -> str:
    """``8 rank(s)``, and how they share the model."""
    if plan.tensor * plan.pipeline == 1:
        return f"{plan.world} rank(s)"
    tokens = ", tokens too" if plan.sequence else ""
    waits = f" (stages wait {100 * plan.bubble:.0f}% of a step)" if plan.pipeline > 1 else ""
    return f"{plan.world} rank(s): {plan.tensor} share a layer{tokens}, {plan.pipeline} stage(s){waits}"


def _memory_line(plan: LayoutPlan) -> str:
    fullest = max(plan.stages, key=lambda stage: stage.total)
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in fullest.bytes.items())
    where = "per rank" if len(plan.stages) == 1 else "on a rank of the fullest stage"
    return f"{parts} GB {where} ({fullest.total / 1e9:.3g} in all, beside buffers of libraries)"
