"""What a run will hold and do, in a few lines: for ``--dry_run``."""

from __future__ import annotations

from typing import Any

from torch import nn

from megadit.config import RunConfig
from megadit.plan.flops import forward_flops
from megadit.plan.layout import LayoutPlan, StagePlan, plan_layout


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


def table(plan: LayoutPlan) -> str:
    """The plan as lines: where ranks stand, how long stages wait, then two tables with a row for each stage: what one
    of its ranks holds, and what it sends."""
    share = f"tensor {plan.tensor}{' with sequence' if plan.sequence else ''}"
    lines = [f"{share} x pipeline {plan.pipeline} x data {plan.data}, ZeRO {plan.zero_stage}"]
    if plan.tensor * plan.pipeline > 1:
        groups = ", ".join(_span(group[0], group[-1]) for group in plan.tensor_groups[:8])
        more = ", ..." if len(plan.tensor_groups) > 8 else ""
        lines.append(f"rank = (stage x {plan.data} + replica) x {plan.tensor} + share; replica 0 is {groups}{more}")
    if plan.pipeline > 1:
        waits, idles = (f"{100 * part:.1f}%" for part in (plan.bubble, plan.idle))
        lines.append(f"waiting: {waits} of a step were all stages equally fast, {idles} by their FLOPs")
    name, unit = ("MB", 1e6) if max(stage.total for stage in plan.stages) < 1e9 else ("GB", 1e9)
    head = ("stage", "ranks", "holds", "FLOPs", "parameters", *plan.stages[0].bytes, "total")
    lines += [
        "",
        f"a rank of each stage holds, in {name}:",
        *_aligned([head, *(_held(stage, unit) for stage in plan.stages)]),
    ]
    kinds = list(dict.fromkeys(kind for stage in plan.stages for kind in stage.sent))
    if kinds:
        sent = [
            (
                str(stage.stage),
                *(_amount(stage.sent.get(kind, 0.0), unit) for kind in kinds),
                _amount(sum(stage.sent.values()), unit),
            )
            for stage in plan.stages
        ]
        lines += ["", f"and sends in a step, in {name}:", *_aligned([("stage", *kinds, "total"), *sent])]
    return "\n".join(lines)


def _held(stage: StagePlan, unit: float) -> tuple[str, ...]:
    first, last = stage.blocks
    held = [f"block{'s' if first < last else ''} {_span(first, last)}"] if last else []
    if "embedding" in stage.ends:
        held.insert(0, "embedding")
    if "readout" in stage.ends:
        held.append("readout")
    return (
        str(stage.stage),
        _span(*stage.ranks),
        ", ".join(held),
        f"{100 * stage.flops_share:.1f}%",
        f"{stage.parameters:,}",
        *(_amount(size, unit) for size in stage.bytes.values()),
        _amount(stage.total, unit),
    )


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _amount(size: float, unit: float) -> str:
    """To three decimals, one of large numbers."""
    value = size / unit
    return "0" if size == 0 else "<0.001" if value < 1e-3 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
