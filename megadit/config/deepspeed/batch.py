"""Batch sizes: global batch = micro batch x accumulation steps x data-parallel replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

from megadit.config.schema.parallel import layout_problem
from megadit.config.schema.run import RunConfig
from megadit.errors import UserError


@dataclass(frozen=True)
class BatchSize:
    """A batch size, its key, and the source of its value for messages (``in FILE``, ``a default``)."""

    value: int
    key: str
    source: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value} ({self.source})"


@dataclass(frozen=True)
class BatchPlan:
    """The batch sizes of one optimizer step; ``micro_batch`` is per replica, ``accumulation`` counts micro batches."""

    global_batch: int
    micro_batch: int
    accumulation: int


def plan_batch(
    world_size: int,
    *,
    global_batch: BatchSize | None,
    micro_batch: BatchSize | None,
    accumulation: BatchSize | None,
    default_global: BatchSize,
    default_micro: int | None,
    ranks_per_replica: int = 1,
) -> BatchPlan:
    """Complete the requested sizes (None: not requested) from the defaults.

    ``world_size`` data-parallel replicas of ``ranks_per_replica`` processes each divide the batch.

    Two requested sizes determine the third. A requested micro batch or accumulation alone keeps the default global
    batch. With neither, a replica's samples are one micro batch, or micro batches of the largest size that divides
    them and is at most ``default_micro``.

    Raises UserError where the sizes do not multiply up; it names them and the nearest global batches that do.
    """
    if global_batch is None and micro_batch is not None and accumulation is not None:
        total = micro_batch.value * accumulation.value * world_size
        return BatchPlan(total, micro_batch.value, accumulation.value)
    total_size = global_batch or default_global
    total = total_size.value
    factors = [size for size in (micro_batch, accumulation) if size is not None]
    unit = world_size
    for size in factors:
        unit *= size.value
    misfit = total != unit if len(factors) == 2 else total % unit != 0
    if misfit:
        raise UserError(_misfit(total_size, factors, unit, world_size, ranks_per_replica))
    if micro_batch is not None:
        return BatchPlan(total, micro_batch.value, total // (micro_batch.value * world_size))
    if accumulation is not None:
        return BatchPlan(total, total // (accumulation.value * world_size), accumulation.value)
    per_replica = total // world_size
    largest = min(default_micro or per_replica, per_replica)
    micro = next(size for size in range(largest, 0, -1) if per_replica % size == 0)
    return BatchPlan(total, micro, per_replica // micro)


def _misfit(total: BatchSize, factors: list[BatchSize], unit: int, world_size: int, ranks_per_replica: int) -> str:
    plural = "s" if world_size > 1 else ""
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    if ranks_per_replica > 1:
        processes = f"{world_size} data-parallel replica{plural} of {ranks_per_replica} processes each"
    parts = [str(size) for size in factors]
    if len(factors) == 2:
        return f"{total} is not {' times '.join(parts)} times {processes}, which is {unit}; change one of them"
    below = total.value // unit * unit
    nearest = f"are {below} and {below + unit}" if below else f"is {unit}"
    return f"{total} is not a multiple of {' times '.join([*parts, processes])}; the nearest possible {nearest}"


def data_parallel_size(config: RunConfig, world_size: int, fits: Callable[[int], bool] = lambda replicas: True) -> int:
    """Number of data-parallel replicas among ``world_size`` processes; ``fits``: whether so many can divide the batch.

    Raises:
        UserError: tensor times pipeline does not divide ``world_size``. It names the nearest numbers of processes that
            are possible, and the nearest layout of ``world_size``.
    """
    parallel = config.parallel
    size = parallel.tensor * parallel.pipeline
    replicas, remainder = divmod(world_size, size)
    if not remainder:
        return replicas
    below = next(filter(fits, range(replicas, 0, -1)), None)
    above = next(filter(fits, range(replicas + 1, replicas + 1 + config.train.global_batch)), None)
    # Where no number fits the batch, that is refused after this.
    numbers = [n * size for n in (below, above) if n] or [(replicas + 1) * size]
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
    """The possible layout of ``world_size`` processes nearest to ``parallel``, as overrides; None if there is no other.

    Distance is that of log2 of the tensor-parallel and pipeline sizes; of equal ones, the layout with more model
    parallelism is taken, which holds less per rank.
    """
    requested = config.parallel
    candidates = []
    for size in (n for n in range(1, world_size + 1) if world_size % n == 0):
        for tensor in (n for n in range(1, size + 1) if size % n == 0):
            changes = {"tensor": tensor, "pipeline": size // tensor, "sequence": requested.sequence and tensor > 1}
            layout = requested.model_copy(update=changes)
            problem = layout_problem(layout, config.model)
            if layout != requested and problem is None and fits(world_size // size):
                distance = abs(log2(tensor / requested.tensor)) + abs(log2(changes["pipeline"] / requested.pipeline))
                candidates.append((distance, -size, changes))
    if not candidates:
        return None
    _, _, changes = min(candidates, key=lambda candidate: candidate[:2])
    new = {key: value for key, value in changes.items() if value != getattr(requested, key)}
    return " ".join(f"parallel.{key}={str(value).lower()}" for key, value in new.items())
