"""``parallel.*``: the layout of a run over processes, and whether the model supports it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from megadit.config.family import Layout, families, family_spec
from megadit.config.schema.model import ModelConfig
from megadit.config.schema.section import Section


class ParallelConfig(Section):
    """The layout of the run over processes."""

    tensor: int = Field(
        1, ge=1, description="tensor-parallel size: consecutive ranks that shard every layer; divides the heads"
    )
    pipeline: int = Field(1, ge=1, description="number of pipeline stages, of balanced FLOPs; needs ZeRO stage 1")
    sequence: bool = Field(
        False,
        description="sequence parallelism: tensor-parallel ranks shard the tokens, too, outside of attention and MLP",
    )
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="ZeRO stage; default 0 for one fp32 process, else 1"
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="seconds that a rank waits for others in a collective before the run ends with an error",
    )
    rendezvous_timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds that ranks wait for each other at the start; default: 600, or timeout_s if that is less",
    )


def layout_problem(parallel: ParallelConfig, model: ModelConfig) -> str | None:
    """Why the model does not support the layout ``parallel``, as one sentence; None if it does."""
    return (
        _family_problem(parallel, model)
        or _pipeline_problem(parallel, model)
        or _sequence_problem(parallel)
        or _tensor_problem(parallel, model)
    )


def _family_problem(parallel: ParallelConfig, model: ModelConfig) -> str | None:
    for key in get_args(Layout):
        value = getattr(parallel, key)
        if value not in (1, False) and key not in family_spec(model.family).layouts:
            supported = ", ".join(spec.name for spec in families() if key in spec.layouts)
            return f"parallel.{key}: {value} works for {supported}, and model.family is {model.family}; leave it out"
    return None


def _pipeline_problem(parallel: ParallelConfig, model: ModelConfig) -> str | None:
    stages, zero, blocks = parallel.pipeline, parallel.zero_stage, model.blocks
    if stages == 1:
        return None
    if stages > blocks + 2:
        return (
            f"parallel.pipeline: {stages} is more than the {blocks + 2} stages of a model of {blocks} blocks; the "
            f"nearest for this model: {blocks + 2}"
        )
    if zero == 0:
        return (
            f"parallel.zero_stage: 0 does not go with parallel.pipeline {stages}, where DeepSpeed would clip by a norm "
            "without the other stages; set parallel.zero_stage=1"
        )
    if zero in (2, 3):
        return (
            f"parallel.zero_stage: {zero} does not go with parallel.pipeline {stages}, whose micro batches add up "
            "gradients that it would share out after each; set parallel.zero_stage=1, or parallel.pipeline=1"
        )
    return None


def _sequence_problem(parallel: ParallelConfig) -> str | None:
    if not parallel.sequence or parallel.tensor > 1:
        return None
    return (
        "parallel.sequence: true cuts tokens between tensor-parallel ranks, and there is one; set parallel.tensor to 2 "
        "or more, or parallel.sequence=false"
    )


def _tensor_problem(parallel: ParallelConfig, model: ModelConfig) -> str | None:
    size = parallel.tensor
    hidden = int(model.width * model.mlp_ratio)
    for what, count in (("model.heads", model.num_heads), ("the MLP's hidden channels", hidden)):
        if count % size:
            possible = [n for n in range(1, count + 1) if model.num_heads % n == 0 and hidden % n == 0]
            below = max(n for n in possible if n < size)
            above = [n for n in possible if n > size][:1]
            alone = " with parallel.sequence=false" if below == 1 and parallel.sequence else ""
            nearest = " or ".join(map(str, [f"{below}{alone}", *above]))
            return f"parallel.tensor: {size} does not divide {what}, {count}; the nearest for this model: {nearest}"
    return None
