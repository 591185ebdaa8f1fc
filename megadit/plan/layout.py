"""The parallel layout of a run, with memory and communication per rank, planned in one process for any world size."""

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
from megadit.plan.kernels import planned_kernels
from megadit.plan.memory import MicroBatchCost, stage_costs, state_bytes

# DeepSpeed's defaults of stage3_param_persistence_threshold, stage3_max_reuse_distance and stage3_max_live_parameters.
_PERSISTENCE_THRESHOLD, _MAX_REUSE_DISTANCE, _MAX_LIVE_PARAMETERS = 10**5, 10**9, 10**9
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage. ``bytes`` (memory) and ``sent`` (in one step) are those of one rank, by kind.

    flops_share: of the forward pass.  in_flight: the most micro batches between their forward and backward pass here.
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
        """Memory of a rank in bytes."""
        return sum(self.bytes.values())


@dataclass(frozen=True)
class LayoutPlan:
    """A layout of ``world`` ranks. Two estimates of the pipeline bubble, as a share of a step: ``bubble`` with equally
    fast stages, ``idle`` by the FLOPs of each.
    """

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
    fused_kernels: tuple[str, ...]  # keys of the configuration's ``kernels`` whose activations are those of fused ones
    stages: tuple[StagePlan, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON, with the most ``bytes_per_rank``."""
        return asdict(self) | {"bytes_per_rank": max(stage.total for stage in self.stages)}


def plan_layout(config: RunConfig, world: int, ds_config: dict[str, Any], parameters: int) -> LayoutPlan:
    """The layout of a resolved configuration for ``world`` ranks. parameters: of the whole model.

    Every pipeline stage is built on the meta device as its first tensor-parallel rank holds it (the others hold as
    much), and one micro batch is run through it there, with the fused kernels that would run on this machine: those
    that ``kernels`` asks for, and all on a GPU with Triton.
    """
    parallel, train = config.parallel, config.train
    flops = stage_flops(config.model)
    cuts = balanced_cuts(flops, parallel.pipeline)
    micro_batch = int(ds_config["train_micro_batch_size_per_gpu"])
    micro_batches = int(ds_config["gradient_accumulation_steps"])
    topology = Topology(world, 0, parallel.tensor, parallel.pipeline)
    data, tensor = topology.data, topology.tensor
    costs = stage_costs(
        config.model,
        cuts,
        micro_batch,
        _DTYPES[train.weights_precision],
        train.activation_checkpointing,
        parallel.tensor,
        sequence=parallel.sequence,
        residual_across_blocks=config.kernels.residual_across_blocks is True,  # auto saves as much as without it
        fp8=train.fp8 if train.precision == "fp8" else None,
    )
    stages, blocks = [], 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with planned_kernels(config.kernels, device) as fused:
        for stage, (chunk, cost) in enumerate(costs):
            sizes = [p.numel() for p in chunk.parameters()]
            in_flight = min(parallel.pipeline - stage, micro_batches)
            memory, sent = _memory_and_sent(config, sizes, cost, data, in_flight, ds_config)
            stages.append(
                StagePlan(
                    stage=stage,
                    ranks=(stage * data * tensor, (stage + 1) * data * tensor - 1),
                    blocks=(blocks + 1, blocks + chunk.blocks) if chunk.blocks else (0, 0),
                    ends=tuple(
                        name for name, has in (("embedding", chunk.is_first), ("readout", chunk.is_last)) if has
                    ),
                    flops_share=sum(flops[cuts[stage] : cuts[stage + 1]]) / sum(flops),
                    parameters=sum(sizes),
                    in_flight=in_flight,
                    bytes=memory,
                    sent=sent,
                )
            )
            blocks += chunk.blocks
    groups = [tuple(g) for g in topology.rank_lists("tensor") if (g[0] // tensor) % data == 0]
    return LayoutPlan(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=data,
        sequence=parallel.sequence,
        zero_stage=int(ds_config["zero_optimization"]["stage"]),
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        parameters=parameters,
        tensor_groups=tuple(groups),
        bubble=bubble_share(parallel.pipeline, micro_batches),
        idle=idle_share([s.flops_share for s in stages], micro_batches, train.activation_checkpointing == "full"),
        fused_kernels=fused,
        stages=tuple(stages),
    )


def _memory_and_sent(
    config: RunConfig, sizes: list[int], cost: MicroBatchCost, replicas: int, in_flight: int, ds_config: dict[str, Any]
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a rank holds, and those that it sends in a step, by kind. sizes: elements of its parameters."""
    precision, zero = config.train.weights_precision, ds_config["zero_optimization"]
    parameters, zero_stage, item = sum(sizes), int(zero["stage"]), _DTYPES[precision].itemsize
    micro_batches = int(ds_config["gradient_accumulation_steps"])
    recompute = config.train.activation_checkpointing != "none"
    accumulated, reduced = gradient_bytes(ds_config, precision)
    # What ZeRO 3 keeps gathered: small tensors always, and layers that are used again soon.
    threshold = zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD)
    small = sum(size for size in sizes if size <= threshold)
    reuse = zero.get("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE)

    memory = state_bytes(parameters, replicas, zero_stage, precision, len(config.ema.names), accumulated)
    buckets = bucket_bytes(ds_config, parameters, precision, config.parallel.pipeline > 1)
    if buckets:
        memory["buckets"] = buckets
    if zero_stage == 3 and replicas > 1:
        retained = (parameters - small) * retained_share(parameters - small, recompute, reuse)
        if zero.get("stage3_prefetch_bucket_size") != 0:  # prefetching gathers layers faster than they are released
            retained = max(retained, zero.get("stage3_max_live_parameters", _MAX_LIVE_PARAMETERS))
        memory["gathered weights"] = (small + min(parameters - small, retained)) * item
    memory["activations"] = float((in_flight - 1) * cost.saved_bytes + cost.peak_bytes)

    per_micro_batch = tensor_bytes(Counter(cost.forward) + Counter(cost.backward), config.parallel.tensor)
    sent = {kind: size * micro_batches for kind, size in per_micro_batch.items()}
    if config.parallel.pipeline > 1:
        sent["pipeline send"] = float((cost.output_bytes + cost.input_grad_bytes) * micro_batches)
    return memory, sent | data_bytes(
        parameters, item, replicas, zero_stage, micro_batches,
        recompute=recompute, gradient=reduced, small=small, reuse=reuse,
    )  # fmt: skip
