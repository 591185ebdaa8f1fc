"""Coordinates of ranks along the pipeline, data and tensor axes, their process groups, and the cuts of a pipeline.

rank = (pipeline rank * data + data rank) * tensor + tensor rank, so that tensor-parallel ranks are neighbours, on one
host. DeepSpeed orders the ranks of a pipeline in the same way (axes pipe, data, model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from megadit.parallel.tensor import UNSHARDED, TensorLayout


@dataclass(frozen=True)
class Topology:
    """The coordinates of ``rank`` among ``world`` ranks; ``tensor`` and ``pipeline`` are the degrees of parallelism.

    ``sequence``: see ``TensorLayout``. ValueError: the degrees do not divide ``world``, or there is no such rank.
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
        """Which tensor-parallel shard of its layers the rank holds."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which data-parallel replica the rank belongs to; all ranks of a replica see the same samples."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Which pipeline stage the rank runs."""
        return self.rank // (self.tensor * self.data)

    def rank_lists(self, axis: str) -> list[list[int]]:
        """Groups of ranks that differ along ``axis`` only: tensor, data, pipeline or model (tensor and pipeline)."""
        keys: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world):
            at = Topology(self.world, rank, self.tensor, self.pipeline)
            fixed = {
                "tensor": (at.pipeline_rank, at.data_rank),
                "data": (at.pipeline_rank, at.tensor_rank),
                "pipeline": (at.data_rank, at.tensor_rank),
                "model": (at.data_rank,),
            }[axis]
            keys.setdefault(fixed, []).append(rank)
        return list(keys.values())


class ProcessGroups:
    """The process groups of a topology (torch.distributed). All ranks must construct it, in the same order."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._rank_lists = {axis: topology.rank_lists(axis) for axis in ("tensor", "data", "pipeline", "model")}
        self._groups = {axis: _new_group(lists, topology.rank) for axis, lists in self._rank_lists.items()}

    def group(self, axis: str) -> Any:
        """This rank's process group along an axis."""
        return self._groups[axis]

    def ranks(self, axis: str) -> list[int]:
        """The ranks of this rank's group along an axis."""
        return next(ranks for ranks in self._rank_lists[axis] if self.topology.rank in ranks)

    @property
    def tensor_layout(self) -> TensorLayout:
        """The layout for which this rank builds its layers."""
        topology = self.topology
        if topology.tensor == 1:
            return UNSHARDED
        return TensorLayout(topology.tensor, topology.tensor_rank, topology.sequence, self.group("tensor"))


def _new_group(rank_lists: Sequence[Sequence[int]], rank: int) -> Any:
    """Make a group of each list (collective over all ranks); returns that of ``rank``."""
    import torch.distributed as dist

    groups = [(ranks, dist.new_group(list(ranks))) for ranks in rank_lists]
    return next(group for ranks, group in groups if rank in ranks)


class ModelParallelUnit:
    """A topology with the interface of Megatron-LM's mpu, for DeepSpeed; model parallel means tensor parallel there."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups, self._topology = groups, groups.topology

    def get_model_parallel_rank(self) -> int:
        """Tensor-parallel rank."""
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self._topology.tensor

    def get_model_parallel_group(self) -> Any:
        """The process group of this rank's tensor-parallel ranks."""
        return self._groups.group("tensor")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of this rank's tensor-parallel ranks."""
        return self._groups.ranks("tensor")[0]

    def get_pipeline_model_parallel_rank(self) -> int:
        """Pipeline stage, from 0."""
        return self._topology.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return self._topology.pipeline

    def get_data_parallel_rank(self) -> int:
        """Data-parallel rank."""
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of data-parallel replicas."""
        return self._topology.data

    def get_data_parallel_group(self) -> Any:
        """The process group of the ranks with the same shard in other replicas."""
        return self._groups.group("data")

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of ``get_data_parallel_group``."""
        return self._groups.ranks("data")


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Cut a list into consecutive ``parts``, the most expensive as cheap as possible: parts + 1 bounds from 0 on.

    Every part has at least one member. Of equally good cuts the one with the larger bounds is taken.

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
            dearest, cuts = best(cut, left - 1)
            options.append((max(before[cut] - before[first], dearest), (cut, *cuts)))
        return min(options, key=lambda option: (option[0], [-cut for cut in option[1]]))

    return [0, *best(0, parts)[1]]
