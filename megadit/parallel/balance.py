"""Cutting a list of stages into pipeline stages of equal work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Where to cut a list into ``parts`` runs whose dearest costs least: parts + 1 bounds, from 0 to len(costs).

    Every run has at least one member. Of equally good cuts the one whose later runs are cheaper is taken: the first
    stages of a pipeline hold the most micro batches.

    Raises:
        ValueError: there are more parts than members.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise ValueError(f"{count} stages cannot be cut into {parts}")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 1:
            return before[count] - before[first], (count,)
        options = []
        for cut in range(first + 1, count - left + 2):
            rest, cuts = best(cut, left - 1)
            options.append((max(before[cut] - before[first], rest), (cut, *cuts)))
        return min(options, key=lambda option: (option[0], [-cut for cut in option[1]]))

    return [0, *best(0, parts)[1]]


def bubble_share(stages: int, micro_batches: int) -> float:
    """Share of a step in which a pipeline stage waits, all being equally fast: (p - 1) / (m + p - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)
