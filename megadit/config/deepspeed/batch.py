"""How processes share a batch: global batch = micro batch x accumulation steps x replicas, one sentence per misfit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

from megadit.config.schema.parallel import layout_problem
from megadit.config.schema.run import RunConfig
from megadit.errors import UserError


@dataclass(frozen=True)
class BatchSize:
    """A batch size and how to speak of it: its key, and where its value comes from (``in FILE``, ``a default``)."""

    value: int
    key: str
    source: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value} ({self.source})"


@dataclass(frozen=True)
class BatchPlan:
    """The sizes of one optimizer step."""

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
    shared: int = 1,
) -> BatchPlan:
    """Complete the sizes that were asked for (None: not asked) from the defaults.

    ``world_size`` data-parallel replicas of the model share the batch, each of ``shared`` processes.

    Two given sizes decide the third. A given micro batch or accumulation alone keeps the default global batch.
    With neither, a rank's share goes through in one pass, or in passes of the largest size that divides it
    and is at most ``default_micro``.

    Raises UserError when the sizes do not multiply up, naming them and the nearest global batches that do.
    """
    if global_batch is None and micro_batch is not None and accumulation is not None:
        total = micro_batch.value * accumulation.value * world_size
        return BatchPlan(total, micro_batch.value, accumulation.value)
    total_size = global_batch or default_global
    total = total_size.value
    given = [size for size in (micro_batch, accumulation) if size is not None]
    unit = world_size
    for size in given:
        unit *= size.value
    misfit = total != unit if len(given) == 2 else total % unit != 0
    if misfit:
        raise UserError(_misfit(total_size, given, unit, world_size, shared))
    if micro_batch is not None:
        return BatchPlan(total, micro_batch.value, total // (micro_batch.value * world_size))
    if accumulation is not None:
        return BatchPlan(total, total // (accumulation.value * world_size), accumulation.value)
    share = total // world_size
    micro = next(size for size in range(min(default_micro or share, share), 0, -1) if share % size == 0)
    return BatchPlan(total, micro, share // micro)


def _misfit(total: BatchSize, given: list[BatchSize], unit: int, world_size: int, shared: int) -> str:
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    if shared > 1:
        processes = f"{world_size} data-parallel replica{'s' if world_size > 1 else ''} of {shared} processes each"
    parts = [str(size) for size in given]
    if len(given) == 2:
        return f"{total} is not {' times '.join(parts)} times {processes}, which is {unit}; change one of them"
    below = total.value // unit * unit
    nearest = f"are {below} and {below + unit}" if below else f"is {unit}"
    over = " times ".join([*parts, processes])
    return f"{total} is not a multiple of {over}; the nearest possible {nearest}"


def data_parallel_size(config: RunConfig, world_size: int, fits: Callable[[int], bool] = lambda copies: True) -> int:
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
            other = asked.model_copy(update=changes)
            problem = layout_problem(other, config.model, compiled=config.train.compile)
            if other != asked and problem is None and fits(world_size // size):
                far = abs(log2(tensor / asked.tensor)) + abs(log2(changes["pipeline"] / asked.pipeline))
                found.append((far, -size, changes))  # of two as near the one that holds less per rank
    if not found:
        return None
    _, _, changes = min(found, key=lambda entry: entry[:2])
    new = {key: value for key, value in changes.items() if value != getattr(asked, key)}
    return " ".join(f"parallel.{key}={str(value).lower()}" for key, value in new.items())
