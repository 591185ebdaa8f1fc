"""Batch arithmetic: global batch = micro batch x accumulation steps x replicas, with one sentence per misfit."""

from __future__ import annotations

from dataclasses import dataclass

from megadit.errors import UserError


@dataclass(frozen=True)
class Size:
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
    global_batch: Size | None,
    micro_batch: Size | None,
    accumulation: Size | None,
    default_global: Size,
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


def _misfit(total: Size, given: list[Size], unit: int, world_size: int, shared: int) -> str:
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
