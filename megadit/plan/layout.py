"""Who holds what, and what it costs: a run's layout, planned in one process for any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megadit.config import RunConfig
from megadit.config.deepspeed.gradients import bucket_bytes, gradient_bytes
from megadit.parallel.topology import Topology, balanced_cuts
from megadit.plan.activations import Passage, count_passages
from megadit.plan.bubble import bubble_share, idle_share
from megadit.plan.communication import data_bytes, share_that_stays, tensor_bytes
from megadit.plan.flops import stage_flops
from megadit.plan.state import state_bytes

# DeepSpeed's own stage3_param_persistence_threshold, stage3_max_reuse_distance and stage3_max_live_parameters.
_SMALL, _REUSE, _LIVE = 10**5, 10**9, 10**9
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage. Bytes are those of one rank, sent bytes those of one rank in one step.

    in_flight: micro batches that are between their forward and their backward pass here, at most.
    """

    stage: int
    ranks: tuple[int, int]  # the first and the last
    blocks: tuple[int, int]  # the first and the last, counted from 1; (0, 0) for none
    ends: tuple[str, ...]  # of embedding, readout
    flops_share: float
    parameters: int
    in_flight: int
    bytes: dict[str, float]
    sent: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of a rank, together."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class LayoutPlan:
    """A layout of ``world`` ranks. ``bubble``: share of a step in which stages wait, were they equally fast;
    ``idle``: the same from the FLOPs of each."""

    world: int
    tensor: int
    pipeline: int
    data: int
    sequence: bool
    zero_stage: int
    micro_batch: int
    micro_batches: int
    parameters: int
    tensor_groups: tuple[tuple[int, ...], ...]  # of the first replica
    bubble: float
    idle: float
    stages: tuple[StagePlan, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"bytes_per_rank": max(stage.total for stage in self.stages)}


def plan_layout(config: RunConfig, world: int, ds_config: dict[str, Any], parameters: int) -> LayoutPlan:
    """The layout of a resolved configuration for ``world`` ranks; ``parameters`` of the whole model.

    Every stage is built on the meta device as its first tensor-parallel rank holds it (the others hold as much), and
    one micro batch is run through it there.
    """
    parallel, train = config.parallel, config.train
    flops = stage_flops(config.model)
    cuts = balanced_cuts(flops, parallel.pipeline)
    micro, many = int(ds_config["train_micro_batch_size_per_gpu"]), int(ds_config["gradient_accumulation_steps"])
    place = Topology(world, 0, parallel.tensor, parallel.pipeline)
    passages = count_passages(
        config.model,
        cuts,
        micro,
        _DTYPES[train.precision],
        train.activation_checkpointing,
        parallel.tensor,
        sequence=parallel.sequence,
    )
    stages, blocks = [], 0
    for stage, (segment, passage) in enumerate(passages):
        sizes = [p.numel() for p in segment.parameters()]
        own, in_flight = segment.blocks, min(parallel.pipeline - stage, many)
        stages.append(
            StagePlan(
                stage=stage,
                ranks=(stage * place.data * place.tensor, (stage + 1) * place.data * place.tensor - 1),
                blocks=(blocks + 1, blocks + own) if own else (0, 0),
                ends=tuple(
                    name for name, has in (("embedding", segment.is_first), ("readout", segment.is_last)) if has
                ),
                flops_share=sum(flops[cuts[stage] : cuts[stage + 1]]) / sum(flops),
                parameters=sum(sizes),
                in_flight=in_flight,
                bytes=_bytes(config, sizes, passage, place.data, in_flight, ds_config),
                sent=_sent(config, sizes, passage, place.data, ds_config),
            )
        )
        blocks += own
    groups = [tuple(g) for g in place.lists("tensor") if (g[0] // place.tensor) % place.data == 0]
    return LayoutPlan(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=place.data,
        sequence=parallel.sequence,
        zero_stage=int(ds_config["zero_optimization"]["stage"]),
        micro_batch=micro,
        micro_batches=many,
        parameters=parameters,
        tensor_groups=tuple(groups),
        bubble=bubble_share(parallel.pipeline, many),
        idle=idle_share([stage.flops_share for stage in stages], many, train.activation_checkpointing == "full"),
        stages=tuple(stages),
    )


def _bytes(
    config: RunConfig, sizes: list[int], passage: Passage, replicas: int, in_flight: int, ds_config: dict[str, Any]
) -> dict[str, float]:
    """``sizes``: elements of each parameter that a rank holds."""
    precision, zero = config.train.precision, ds_config["zero_optimization"]
    held, stage = sum(sizes), int(zero["stage"])
    added, _ = gradient_bytes(ds_config, precision)
    counted = state_bytes(held, replicas, stage, precision, len(config.ema.names), added)
    buckets = bucket_bytes(ds_config, held, precision, config.parallel.pipeline > 1)
    if buckets:
        counted["buckets"] = buckets
    if stage == 3 and replicas > 1:
        small, recompute, reuse = _kept(config, sizes, ds_config)
        stay = (held - small) * share_that_stays(held - small, recompute, reuse)
        if zero.get("stage3_prefetch_bucket_size") != 0:  # every layer fetches more, faster than they are let go
            stay = max(stay, zero.get("stage3_max_live_parameters", _LIVE))
        counted["gathered weights"] = (small + min(held - small, stay)) * _DTYPES[precision].itemsize
    return counted | {"activations": float((in_flight - 1) * passage.kept + passage.peak)}


def _kept(config: RunConfig, sizes: list[int], ds_config: dict[str, Any]) -> tuple[int, bool, int]:
    """What decides which weights ZeRO 3 keeps gathered: elements that are so all the time, recomputation, and
    the distance between two uses."""
    zero = ds_config["zero_optimization"]
    stays = zero.get("stage3_param_persistence_threshold", _SMALL)
    small = sum(size for size in sizes if size <= stays)
    return small, config.train.activation_checkpointing != "none", zero.get("stage3_max_reuse_distance", _REUSE)


def _sent(
    config: RunConfig, sizes: list[int], passage: Passage, replicas: int, ds_config: dict[str, Any]
) -> dict[str, float]:
    precision, zero = config.train.precision, ds_config["zero_optimization"]
    many = int(ds_config["gradient_accumulation_steps"])
    per_batch = tensor_bytes(Counter(passage.forward) + Counter(passage.backward), config.parallel.tensor)
    sent = {kind: size * many for kind, size in per_batch.items()}
    if config.parallel.pipeline > 1:
        sent["pipeline send"] = float((passage.wire_out + passage.wire_back) * many)
    small, recompute, reuse = _kept(config, sizes, ds_config)
    return sent | data_bytes(
        sum(sizes),
        _DTYPES[precision].itemsize,
        replicas,
        int(zero["stage"]),
        many,
        recompute=recompute,
        gradient=gradient_bytes(ds_config, precision)[1],
        small=small,
        reuse=reuse,
    )


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
