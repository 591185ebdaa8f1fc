"""Model, layout, memory, communication and length of a run as text, for ``--dry_run``."""

from __future__ import annotations

from typing import Any

from torch import nn

from megadit.config import RunConfig
from megadit.plan.flops import forward_flops
from megadit.plan.layout import LayoutPlan, StagePlan, plan_layout
from megadit.tables import aligned


def describe_plan(
    config: RunConfig, model: nn.Module, steps: int | None, ranks: int, ds_config: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Size, layout, memory and total compute, as text with a table of the pipeline stages and as plain values (JSON).

    model: any whose parameters are those of ``config``, on the meta device, too.  steps: None where the length of the
    run depends on data that are not there.
    """
    parameters = sum(p.numel() for p in model.parameters())
    plan = plan_layout(config, ranks, ds_config, parameters)
    m, batch = config.model, config.train.global_batch
    step_flops = 3 * forward_flops(m) * batch
    mup = f"muP, base width {m.base_width}, m = {m.width_mult:g}" if m.parametrization == "mup" else "SP"
    length = "depends on the data, which are not there" if steps is None else _length(steps, batch, step_flops)
    text = "\n".join(
        [
            f"model        {m.family} width {m.width}, depth {m.depth}, heads {m.num_heads} x {m.head_channels}, patch "
            f"{m.patch_size}: {parameters:,} trained parameters; {mup}",
            f"layout       {_layout_line(plan)}, ZeRO {plan.zero_stage}, {config.train.precision}; batch {batch} = "
            f"{plan.micro_batch} x {plan.micro_batches} accumulated x {plan.data} "
            f"data-parallel {'rank(s)' if plan.data == ranks else 'replica(s)'}",
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
    """``8 rank(s)``, and the degrees of parallelism where they share the model."""
    if plan.tensor * plan.pipeline == 1:
        return f"{plan.world} rank(s)"
    bubble = f" (bubble {100 * plan.bubble:.0f}% of a step)" if plan.pipeline > 1 else ""
    return f"{plan.world} rank(s): {_degrees(plan)}{bubble}"


def _degrees(plan: LayoutPlan) -> str:
    """``tensor 2 with sequence x pipeline 2 x data 1``."""
    return (
        f"tensor {plan.tensor}{' with sequence' if plan.sequence else ''} x pipeline {plan.pipeline} x data {plan.data}"
    )


def _memory_line(plan: LayoutPlan) -> str:
    fullest = max(plan.stages, key=lambda stage: stage.total)
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in fullest.bytes.items())
    where = "per rank" if len(plan.stages) == 1 else "on a rank of the fullest stage"
    kernels = f"fused kernels: {', '.join(plan.fused_kernels)}" if plan.fused_kernels else "no fused kernels"
    return f"{parts} GB {where} (total {fullest.total / 1e9:.3g}, without workspaces of libraries; {kernels})"


def table(plan: LayoutPlan) -> str:
    """The plan as lines: the numbering of ranks, the pipeline bubble, then two tables with a row per pipeline stage, of
    the memory of one of its ranks and of the bytes that it sends in a step.
    """
    lines = [f"{_degrees(plan)}, ZeRO {plan.zero_stage}"]
    if plan.tensor * plan.pipeline > 1:
        groups = ", ".join(_span(group[0], group[-1]) for group in plan.tensor_groups[:8])
        more = ", ..." if len(plan.tensor_groups) > 8 else ""
        lines.append(
            f"rank = (stage x {plan.data} + replica) x {plan.tensor} + tensor rank; replica 0 is {groups}{more}"
        )
    if plan.pipeline > 1:
        bubble, idle = (f"{100 * share:.1f}%" for share in (plan.bubble, plan.idle))
        lines.append(f"pipeline bubble: {bubble} of a step with equally fast stages, {idle} by the FLOPs of each stage")
    name, unit = ("MB", 1e6) if max(stage.total for stage in plan.stages) < 1e9 else ("GB", 1e9)
    header = ("stage", "ranks", "layers", "FLOPs", "parameters", *plan.stages[0].bytes, "total")
    lines += ["", f"memory per rank, in {name}:", aligned(header, (_memory_row(s, unit) for s in plan.stages), left=3)]
    kinds = list(dict.fromkeys(kind for stage in plan.stages for kind in stage.sent))
    if kinds:
        rows = [
            [
                str(s.stage),
                *(_amount(size, unit) for size in (*(s.sent.get(k, 0.0) for k in kinds), sum(s.sent.values()))),
            ]
            for s in plan.stages
        ]
        lines += ["", f"sent per rank and step, in {name}:", aligned(("stage", *kinds, "total"), rows)]
    return "\n".join(lines)


def _memory_row(stage: StagePlan, unit: float) -> tuple[str, ...]:
    first, last = stage.blocks
    layers = [f"block{'s' if first < last else ''} {_span(first, last)}"] if last else []
    if "embedding" in stage.ends:
        layers.insert(0, "embedding")
    if "readout" in stage.ends:
        layers.append("readout")
    return (
        str(stage.stage),
        _span(*stage.ranks),
        ", ".join(layers),
        f"{100 * stage.flops_share:.1f}%",
        f"{stage.parameters:,}",
        *(_amount(size, unit) for size in (*stage.bytes.values(), stage.total)),
    )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _amount(size: float, unit: float) -> str:
    """``size`` bytes in ``unit``: to three decimals, one from 10 on."""
    value = size / unit
    return "0" if size == 0 else "<0.001" if value < 1e-3 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
