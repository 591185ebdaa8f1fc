"""Which ways to spread a run are possible: checks of ``parallel.*`` against the model and the number of processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadit.errors import UserError

if TYPE_CHECKING:
    from megadit.config.run import RunConfig

# Families whose own layers were made to be shared out, and those whose token streams can be cut.
TENSOR_FAMILIES = ("dit",)
SEQUENCE_FAMILIES = ("dit",)


def layout_problem(config: RunConfig) -> str | None:
    """Why the model cannot be shared out as ``parallel`` asks, as one sentence; None if it can."""
    parallel, model = config.parallel, config.model
    size = parallel.tensor
    if parallel.sequence and size == 1:
        return (
            "parallel.sequence: true cuts tokens between tensor-parallel ranks, and there is one; set parallel.tensor "
            "above 1, or sequence=false"
        )
    if size == 1:
        return None
    for key, families in (("tensor", TENSOR_FAMILIES), ("sequence", SEQUENCE_FAMILIES)):
        value = getattr(parallel, key)
        if value not in (1, False) and model.family not in families:
            return (
                f"parallel.{key}: {value} works for {', '.join(families)}, and model.family is {model.family}; leave "
                "it out"
            )
    hidden = int(model.width * model.mlp_ratio)
    for what, count in (("model.heads", model.num_heads), ("the MLP's hidden channels", hidden)):
        if count % size:
            possible = [n for n in range(1, count + 1) if model.num_heads % n == 0 and hidden % n == 0]
            below = max(n for n in possible if n < size)
            above = [n for n in possible if n > size][:1]
            nearest = " or ".join(map(str, [below, *above]))
            return f"parallel.tensor: {size} does not divide {what}, {count}; the nearest possible: {nearest}"
    if config.train.compile:
        return (
            f"train.compile: true does not go with parallel.tensor {size}, whose collectives cut what is compiled into "
            "pieces; set it to false"
        )
    return None


def replicas(config: RunConfig, world_size: int) -> int:
    """Data-parallel replicas of ``world_size`` processes.

    Raises:
        UserError: the processes cannot be shared out; the nearest possible numbers are named.
    """
    size = config.parallel.tensor
    if world_size % size:
        below = world_size // size * size
        nearest = f"are {below} and {below + size}" if below else f"is {size}"
        raise UserError(
            f"parallel.tensor: {size} does not divide the {world_size} process{'es' if world_size > 1 else ''} of this "
            f"run; the nearest possible number of processes {nearest}"
        )
    return world_size // size
