"""Who holds what, and what it costs: a run's layout, planned in one process for any number of ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megadit.config import RunConfig
from megadit.config.deepspeed.gradients import bucket_bytes, gradient_bytes
from megadit.parallel.topology import Topology, balanced_cuts
from megadit.plan.bubble import bubble_share, idle_share
from megadit.plan.communication import data_bytes, retained_share, tensor_bytes
from megadit.plan.flops import stage_flops
from megadit.plan.memory import MicroBatchCost, stage_costs, state_bytes

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
    passages = stage_costs(
        config.model,
        cuts,
        micro,
        _DTYPES[train.precision],
        train.activation_checkpointing,
        parallel.tensor,
        sequence=parallel.sequence,
    )
    stages, blocks = [], 0
    for stage, (chunk, passage) in enumerate(passages):
        sizes = [p.numel() for p in chunk.parameters()]
        own, in_flight = chunk.blocks, min(parallel.pipeline - stage, many)
        held, sent = _costs(config, sizes, passage, place.data, in_flight, ds_config)
        stages.append(
            StagePlan(
                stage=stage,
                ranks=(stage * place.data * place.tensor, (stage + 1) * place.data * place.tensor - 1),
                blocks=(blocks + 1, blocks + own) if own else (0, 0),
                ends=tuple(name for name, has in (("embedding", chunk.is_first), ("readout", chunk.is_last)) if has),
                flops_share=sum(flops[cuts[stage] : cuts[stage + 1]]) / sum(flops),
                parameters=sum(sizes),
                in_flight=in_flight,
                bytes=held,
                sent=sent,
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


def _costs(
    config: RunConfig,
    sizes: list[int],
    passage: MicroBatchCost,
    replicas: int,
    in_flight: int,
    ds_config: dict[str, Any],
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a rank holds, and those that it sends in a step; ``sizes``: elements of each parameter of its own."""
    precision, zero = config.train.precision, ds_config["zero_optimization"]
    own, stage, item = sum(sizes), int(zero["stage"]), _DTYPES[precision].itemsize
    many, recompute = int(ds_config["gradient_accumulation_steps"]), config.train.activation_checkpointing != "none"
    added, summed = gradient_bytes(ds_config, precision)
    # What ZeRO 3 keeps gathered: small tensors all the time, and layers between two uses that are near.
    threshold = zero.get("stage3_param_persistence_threshold", _SMALL)
    small = sum(size for size in sizes if size <= threshold)
    reuse = zero.get("stage3_max_reuse_distance", _REUSE)

    held = state_bytes(own, replicas, stage, precision, len(config.ema.names), added)
    buckets = bucket_bytes(ds_config, own, precision, config.parallel.pipeline > 1)
    if buckets:
        held["buckets"] = buckets
    if stage == 3 and replicas > 1:
        stay = (own - small) * retained_share(own - small, recompute, reuse)
        if zero.get("stage3_prefetch_bucket_size") != 0:  # every layer fetches more, faster than they are let go
            stay = max(stay, zero.get("stage3_max_live_parameters", _LIVE))
        held["gathered weights"] = (small + min(own - small, stay)) * item
    held["activations"] = float((in_flight - 1) * passage.kept + passage.peak)

    per_batch = tensor_bytes(Counter(passage.forward) + Counter(passage.backward), config.parallel.tensor)
    sent = {kind: size * many for kind, size in per_batch.items()}
    if config.parallel.pipeline > 1:
        sent["pipeline send"] = float((passage.wire_out + passage.wire_back) * many)
    between = data_bytes(
        own, item, replicas, stage, many, recompute=recompute, gradient=summed, small=small, reuse=reuse
    )
    return held, sent | between
