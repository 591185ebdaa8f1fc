"""Which ways to spread a run are possible: checks of ``parallel.*`` against the model and the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import TYPE_CHECKING

from megadit.errors import UserError

if TYPE_CHECKING:
    from megadit.config.schema.run import RunConfig

# Families whose own layers were made to be shared out, and those whose token streams can be cut.
TENSOR_FAMILIES = ("dit", "pixart", "uvit", "mmdit")
SEQUENCE_FAMILIES = ("dit", "pixart", "uvit", "mmdit")
PIPELINE_FAMILIES = ("dit", "pixart", "uvit", "mmdit")


def layout_problem(config: RunConfig) -> str | None:
    """Why the model cannot be shared out as ``parallel`` asks, as one sentence; None if it can."""
    problems = (_family_problem(config), _pipeline_problem(config), _sequence_problem(config), _tensor_problem(config))
    return next(filter(None, problems), None)


def _family_problem(config: RunConfig) -> str | None:
    family = config.model.family
    made_for = {"tensor": TENSOR_FAMILIES, "sequence": SEQUENCE_FAMILIES, "pipeline": PIPELINE_FAMILIES}
    for key, families in made_for.items():
        value = getattr(config.parallel, key)
        if value not in (1, False) and family not in families:
            return (
                f"parallel.{key}: {value} works for {', '.join(families)}, and model.family is {family}; leave it out"
            )
    return None


def _pipeline_problem(config: RunConfig) -> str | None:
    stages, zero, blocks = config.parallel.pipeline, config.parallel.zero_stage, config.model.blocks
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
    if config.train.compile:
        return f"train.compile: true does not go with parallel.pipeline {stages}; set it to false"
    return None


def _sequence_problem(config: RunConfig) -> str | None:
    if not config.parallel.sequence or config.parallel.tensor > 1:
        return None
    return (
        "parallel.sequence: true cuts tokens between tensor-parallel ranks, and there is one; set parallel.tensor to 2 "
        "or more, or parallel.sequence=false"
    )


def _tensor_problem(config: RunConfig) -> str | None:
    size, model = config.parallel.tensor, config.model
    hidden = int(model.width * model.mlp_ratio)
    for what, count in (("model.heads", model.num_heads), ("the MLP's hidden channels", hidden)):
        if count % size:
            possible = [n for n in range(1, count + 1) if model.num_heads % n == 0 and hidden % n == 0]
            below = max(n for n in possible if n < size)
            above = [n for n in possible if n > size][:1]
            alone = " with parallel.sequence=false" if below == 1 and config.parallel.sequence else ""
            nearest = " or ".join(map(str, [f"{below}{alone}", *above]))
            return f"parallel.tensor: {size} does not divide {what}, {count}; the nearest for this model: {nearest}"
    if size > 1 and config.train.compile:
        return (
            f"train.compile: true does not go with parallel.tensor {size}, whose collectives cut what is compiled into "
            "pieces; set it to false"
        )
    return None


def replicas(config: RunConfig, world_size: int, fits: Callable[[int], bool] = lambda copies: True) -> int:
    """Data-parallel replicas of ``world_size`` processes; ``fits``: whether that many could share the batch.

    Raises:
        UserError: the processes cannot be shared out; the nearest possible numbers of them are named, and the nearest
            layout of as many as there are.
    """
    parallel = config.parallel
    size = parallel.tensor * parallel.pipeline
    copies, rest = divmod(world_size, size)
    if not rest:
        return copies
    below = next(filter(fits, range(copies, 0, -1)), None)
    above = next(filter(fits, range(copies + 1, copies + 1 + config.train.global_batch)), None)
    # Where the batch fits none, it is what is refused next.
    numbers = [n * size for n in (below, above) if n] or [(copies + 1) * size]
    nearest = f"numbers of processes are {numbers[0]} and {numbers[1]}" if numbers[1:] else f"is {numbers[0]}"
    key = "tensor" if parallel.pipeline == 1 else "pipeline"
    times = f" times parallel.tensor {parallel.tensor}" if key == "pipeline" and parallel.tensor > 1 else ""
    layout = nearest_layout(config, world_size, fits)
    raise UserError(
        f"parallel.{key}: {getattr(parallel, key)}{times} does not divide the {world_size} "
        f"process{'es' if world_size > 1 else ''} of this run; the nearest possible {nearest}"
        + (f", or for {world_size}: {layout}" if layout else "")
    )


def nearest_layout(config: RunConfig, world_size: int, fits: Callable[[int], bool]) -> str | None:
    """The possible layout of ``world_size`` processes that is nearest to what ``parallel`` asks, as the overrides that
    make it; None if there is no other."""
    asked = config.parallel
    found = []
    for size in (n for n in range(1, world_size + 1) if world_size % n == 0):
        for tensor in (n for n in range(1, size + 1) if size % n == 0):
            changes = {"tensor": tensor, "pipeline": size // tensor, "sequence": asked.sequence and tensor > 1}
            other = config.model_copy(update={"parallel": asked.model_copy(update=changes)})
            if other.parallel != asked and layout_problem(other) is None and fits(world_size // size):
                far = abs(log2(tensor / asked.tensor)) + abs(log2(changes["pipeline"] / asked.pipeline))
                found.append((far, -size, changes))  # of two as near the one that holds less per rank
    if not found:
        return None
    _, _, changes = min(found, key=lambda entry: entry[:2])
    new = {key: value for key, value in changes.items() if value != getattr(asked, key)}
    return " ".join(f"parallel.{key}={str(value).lower()}" for key, value in new.items())
