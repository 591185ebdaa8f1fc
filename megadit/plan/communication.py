"""Bytes that a rank sends in one optimizer step, by kind.

Counted as rings send them (``ring_bytes``), whatever algorithm a library takes. What DeepSpeed does for data
parallelism was counted on its collectives, version 0.19: ZeRO 1 and 2 sum whole gradients with all-reduce, stage 2
after every micro batch, where each rank needs its share of the sum alone. Scalars (norms, overflow flags) are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megadit.parallel.collectives import Kind, ring_bytes


def tensor_bytes(calls: Mapping[tuple[Kind, int], int], ranks: int) -> dict[str, float]:
    """Bytes sent for collectives between ``ranks`` tensor-parallel ranks, by kind."""
    sent: Counter[str] = Counter()
    for (kind, size), times in calls.items():
        sent[f"tensor {kind}"] += times * ring_bytes(kind, size, ranks)  # type: ignore[assignment]
    return dict(sent)


def data_bytes(
    parameters: int,
    item: int,
    replicas: int,
    zero_stage: int,
    micro_batches: int,
    *,
    recompute: bool,
    gradient: int | None = None,
    small: int = 0,
    reuse: int = 10**9,
) -> dict[str, float]:
    """Bytes sent between the replicas of ``parameters`` held by a rank, ``item`` bytes each, in one step; ``gradient``
    bytes of each in sums of gradients, None for the same.

    ZeRO 3 gathers weights for every forward pass, and for the backward pass those that it let go between: a layer stays
    when fewer than ``reuse`` elements (stage3_max_reuse_distance) are used before it is needed again. So it also stays
    from its recomputation to its backward pass. ``small`` elements are of tensors that stay all the time
    (stage3_param_persistence_threshold), and are gathered once, after the update. This is the most: what DeepSpeed
    fetches ahead (stage3_prefetch_bucket_size) it does not let go, which spares gathers.
    """
    if replicas == 1:
        return {}
    sums = parameters * (gradient or item)
    summed, half = ring_bytes("all_reduce", sums, replicas), ring_bytes("all_gather", parameters * item, replicas)
    if zero_stage == 0:
        return {"data all_reduce of gradients": summed}
    if zero_stage == 3:
        rest = parameters - small
        gathered = rest * (2 - retained_share(rest, recompute, reuse)) * micro_batches + small
        return {
            "data all_gather of weights": gathered / parameters * half,
            "data reduce_scatter of gradients": ring_bytes("reduce_scatter", sums, replicas) * micro_batches,
        }
    times = micro_batches if zero_stage == 2 else 1
    return {"data all_reduce of gradients": summed * times, "data all_gather of weights": half}


def retained_share(elements: int, recompute: bool, reuse: int) -> float:
    """Of ``elements`` that ZeRO 3 gathers for the forward pass, the share that stays for the backward pass."""
    return min(1.0, reuse / max(1, (3 if recompute else 2) * elements))
