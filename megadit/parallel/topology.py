"""Who shares what: the place of every rank among pipeline stages, data-parallel replicas and tensor-parallel shares,
and where the stages are cut.

rank = (pipeline * data + replica) * tensor + share, so that the ranks of a layer are neighbours, on one host. DeepSpeed
orders its pipelines the same way (axes pipe, data, model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megadit.parallel.tensor import UNSHARDED, TensorLayout


@dataclass(frozen=True)
class Topology:
    """The place of ``rank`` among ``world`` ranks, ``tensor`` to a layer in ``pipeline`` stages.

    ``sequence``: see ``TensorLayout``.
    """

    world: int = 1
    rank: int = 0
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    def __post_init__(self) -> None:
        if self.world % (self.tensor * self.pipeline) or not 0 <= self.rank < self.world:
            raise ValueError(f"impossible topology: {self}")

    @property
    def data(self) -> int:
        """Number of data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def tensor_rank(self) -> int:
        """Which share of its layers the rank holds."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which replica it belongs to: all of a replica's ranks see the same samples."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Which stage it runs."""
        return self.rank // (self.tensor * self.data)

    def lists(self, axis: str) -> list[list[int]]:
        """The groups of ranks that differ along ``axis`` alone: tensor, data, pipeline or model (both others)."""
        keys: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            place = Topology(self.world, rank, self.tensor, self.pipeline)
            fixed = {
                "tensor": (place.pipeline_rank, place.data_rank),
                "data": (place.pipeline_rank, place.tensor_rank),
                "pipeline": (place.data_rank, place.tensor_rank),
                "model": (place.data_rank,),
            }[axis]
            keys.setdefault(fixed, []).append(rank)
        return list(keys.values())


class ProcessGroups:
    """The process groups of a topology. All ranks must make them, in the same order."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.lists = {axis: topology.lists(axis) for axis in ("tensor", "data", "pipeline", "model")}
        self._groups = {axis: _own_group(lists, topology.rank) for axis, lists in self.lists.items()}

    def group(self, axis: str) -> Any:
        """The process group along an axis that this rank is in."""
        return self._groups[axis]

    def ranks(self, axis: str) -> list[int]:
        """Its ranks."""
        return next(ranks for ranks in self.lists[axis] if self.topology.rank in ranks)

    @property
    def tensor_layout(self) -> TensorLayout:
        """What layers need to know."""
        place = self.topology
        if place.tensor == 1:
            return UNSHARDED
        return TensorLayout(place.tensor, place.tensor_rank, place.sequence, self.group("tensor"))


def _own_group(lists: Sequence[Sequence[int]], rank: int) -> Any:
    import torch.distributed as dist

    own = None
    for ranks in lists:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            own = group
    return own


class ModelParallelUnit:
    """A topology in the words of DeepSpeed (Megatron-LM's mpu): model parallel means tensor parallel here."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups, self._place = groups, groups.topology

    def get_model_parallel_rank(self) -> int:
        """Share of the layers."""
        return self._place.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Ranks that share a layer."""
        return self._place.tensor

    def get_model_parallel_group(self) -> Any:
        """The ranks that share this one's layers."""
        return self._groups.group("tensor")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The first of the ranks that share this one's layers."""
        return self._groups.ranks("tensor")[0]

    def get_pipeline_model_parallel_rank(self) -> int:
        """The stage."""
        return self._place.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of stages."""
        return self._place.pipeline

    def get_data_parallel_rank(self) -> int:
        """The replica."""
        return self._place.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self._place.data

    def get_data_parallel_group(self) -> Any:
        """The ranks that hold the same as this one."""
        return self._groups.group("data")

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Them by number."""
        return self._groups.ranks("data")


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
