"""Bytes that a rank sends in one optimizer step, by kind.

Counted for ring algorithms (``ring_bytes``), whichever a library uses. The collectives of DeepSpeed's data parallelism
were measured, version 0.19: ZeRO 1 and 2 all-reduce whole gradients, stage 2 after every micro batch, although each
rank needs only its shard of the sum. Scalars (norms, overflow flags) are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from megadit.parallel.collectives import CollectiveKind, ring_bytes


def tensor_bytes(calls: Mapping[tuple[CollectiveKind, int], int], ranks: int) -> dict[str, float]:
    """Bytes that each of ``ranks`` tensor-parallel ranks sends, by kind; ``calls`` of (kind, bytes of tensor)."""
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
    """Bytes that a rank sends to the other data-parallel replicas in one step, by kind.

    parameters: held by the rank, ``item`` bytes each.  gradient: bytes of a reduced gradient, None: ``item``.

    ZeRO 3 gathers weights for every forward pass, and again for the backward pass those that it released in between: a
    layer stays gathered when fewer than ``reuse`` elements (stage3_max_reuse_distance) are used before it is needed
    again, and so from its recomputation to its backward pass. ``small`` elements are of tensors that are never released
    (stage3_param_persistence_threshold), and are gathered once, after the update. This is an upper bound: layers that
    prefetching (stage3_prefetch_bucket_size) gathered are not released, which saves all-gathers.
    """
    if replicas == 1:
        return {}
    gradients = parameters * (gradient or item)
    all_reduce = ring_bytes("all_reduce", gradients, replicas)
    all_gather = ring_bytes("all_gather", parameters * item, replicas)
    if zero_stage == 0:
        return {"data all_reduce of gradients": all_reduce}
    if zero_stage == 3:
        large = parameters - small
        gathered = large * (2 - retained_share(large, recompute, reuse)) * micro_batches + small
        return {
            "data all_gather of weights": gathered / parameters * all_gather,
            "data reduce_scatter of gradients": ring_bytes("reduce_scatter", gradients, replicas) * micro_batches,
        }
    times = micro_batches if zero_stage == 2 else 1
    return {"data all_reduce of gradients": all_reduce * times, "data all_gather of weights": all_gather}


def retained_share(elements: int, recompute: bool, reuse: int) -> float:
    """Of ``elements`` that ZeRO 3 gathers for the forward pass, the share that stays gathered for the backward pass."""
    return min(1.0, reuse / max(1, (3 if recompute else 2) * elements))
