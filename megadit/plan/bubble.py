"""How long pipeline stages wait: the 1F1B schedule played through with each stage's own work."""

from __future__ import annotations

from collections.abc import Sequence


def idle_share(work: Sequence[float], micro_batches: int, recompute: bool = False) -> float:
    """Share of a step that the stages wait on the average, if transfers took no time.

    work: forward FLOPs of each stage, in any unit. A backward pass costs twice a forward pass, and once more where it
    ``recompute``s. Equal stages give (p - 1) / (m + p - 1).
    """
    stages = len(work)
    back = 3.0 if recompute else 2.0
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    done: dict[tuple[int, int, bool], float] = {}  # (stage, micro batch, is backward) -> when
    clock, at = [0.0] * stages, [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        for s in range(stages):
            while at[s] < len(orders[s]):
                number, backward = orders[s][at[s]]
                before = s + 1 if backward else s - 1
                needs = (before, number, backward) if 0 <= before < stages else None
                if needs is not None and needs not in done:
                    break
                begin = max(clock[s], done[needs] if needs is not None else 0.0)
                clock[s] = begin + work[s] * (back if backward else 1.0)
                done[s, number, backward] = clock[s]
                at[s] += 1
    busy = sum(work) * (1 + back) * micro_batches
    return max(0.0, 1 - busy / (stages * max(clock)))


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[int, bool]]:
    """What a stage does one after the other: forward passes to fill the pipeline, then one of each, then the rest."""
    ahead = min(stages - stage - 1, micro_batches)
    order = [(number, False) for number in range(ahead)]
    for number in range(micro_batches - ahead):
        order += [(number + ahead, False), (number, True)]
    return order + [(number, True) for number in range(micro_batches - ahead, micro_batches)]


def bubble_share(stages: int, micro_batches: int) -> float:
    """Share of a step in which a pipeline stage waits, all being equally fast: (p - 1) / (m + p - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)
