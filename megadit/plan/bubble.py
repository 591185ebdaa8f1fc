"""Two estimates of the pipeline bubble: by formula for equal stages, and by simulating the 1F1B schedule."""

from __future__ import annotations

from collections.abc import Sequence


def idle_share(work: Sequence[float], micro_batches: int, recompute: bool = False) -> float:
    """Share of a step in which a stage is idle, averaged over the stages, if transfers took no time.

    work: forward FLOPs of each stage, in any unit. A backward pass counts as two forward passes, as three with
    ``recompute``. Equal stages give ``bubble_share``.
    """
    stages = len(work)
    backward_cost = 3.0 if recompute else 2.0
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    finished: dict[tuple[int, int, bool], float] = {}  # (stage, micro batch, is backward) -> time
    clock, position = [0.0] * stages, [0] * stages
    while any(position[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while position[s] < len(orders[s]):
                number, backward = orders[s][position[s]]
                neighbour = s + 1 if backward else s - 1
                needed = (neighbour, number, backward) if 0 <= neighbour < stages else None
                if needed is not None and needed not in finished:
                    break
                start = max(clock[s], finished[needed] if needed is not None else 0.0)
                clock[s] = start + work[s] * (backward_cost if backward else 1.0)
                finished[s, number, backward] = clock[s]
                position[s] += 1
    busy = sum(work) * (1 + backward_cost) * micro_batches
    return max(0.0, 1 - busy / (stages * max(clock)))


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[int, bool]]:
    """1F1B on one stage, (micro batch, is backward) in order: forward passes to fill the pipeline, then one forward and
    one backward pass in turn, then the remaining backward passes.
    """
    ahead = min(stages - stage - 1, micro_batches)
    order = [(number, False) for number in range(ahead)]
    for number in range(micro_batches - ahead):
        order += [(number + ahead, False), (number, True)]
    return order + [(number, True) for number in range(micro_batches - ahead, micro_batches)]


def bubble_share(stages: int, micro_batches: int) -> float:
    """The bubble of p equally fast stages and m micro batches, as a share of a step: (p - 1) / (m + p - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)
