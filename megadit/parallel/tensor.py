"""Tensor parallelism of a layer: this rank's shard of heads, channels and tokens.

A model is built the same way for any layout: inside ``with building(layout)`` tensor-parallel layers allocate their
shards of the layout's rank; their declarations (``ParamSpec``) stay global. A layer's ``param_regions`` holds, by the
parameter's local name, the elements of a shard as shard regions (``megadit.slices``); a parameter that is not named
there is replicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from megadit.slices import ShardRegions


@dataclass(frozen=True)
class TensorLayout:
    """This tensor-parallel rank, ``rank`` of ``size``.

    ``sequence``: sequence parallelism: between tensor-parallel layers token streams are sharded by tokens. ``group`` is
    the process group of the ``size`` ranks; None builds shapes that cannot run, a ``CollectiveRecorder`` runs on the
    meta device.
    """

    size: int = 1
    rank: int = 0
    sequence: bool = False
    group: Any = field(default=None, compare=False, repr=False)

    def __deepcopy__(self, _memo: Any) -> TensorLayout:
        return self  # a process group cannot be copied, and a copied model lives in the same one

    @property
    def group_name(self) -> str:
        """By which compiled graphs know the process group."""
        name: str = self.group.group_name
        return name

    def local_size(self, size: int, unit: str) -> int:
        """``size`` / ranks: how many heads, channels ... (``unit``) a rank holds.

        Raises:
            ValueError: the ranks do not divide ``size``.
        """
        if size % self.size:
            raise ValueError(f"{self.size} tensor-parallel ranks do not divide {size} {unit}")
        return size // self.size


UNSHARDED = TensorLayout()
_building: ContextVar[TensorLayout] = ContextVar("tensor_layout", default=UNSHARDED)


@contextmanager
def building(layout: TensorLayout | None) -> Iterator[None]:
    """Models built inside the block hold one rank's shard of their parameters (None: all of them)."""
    token = _building.set(layout or UNSHARDED)
    try:
        yield
    finally:
        _building.reset(token)


def tensor_layout() -> TensorLayout:
    """The layout for which a model is being built now."""
    return _building.get()


def shard_shape(
    shape: Sequence[int], layout: TensorLayout, dim: int, parts: int = 1
) -> tuple[tuple[int, ...], ShardRegions]:
    """Local shape and shard regions of this rank's shard of a parameter of global ``shape``, sharded along ``dim``.

    parts: number of matrices side by side along ``dim`` (3 for q, k and v, 2 for gate and up), each sharded by itself.
    Along the first dimension the local parts are concatenated, along another they are stacked: (parts, ...).

    Raises:
        ValueError: the ranks do not divide a part.
    """
    part = shape[dim] // parts
    local = layout.local_size(part, f"channels of a parameter of shape {tuple(shape)}")
    spans = [(p * part + layout.rank * local, p * part + (layout.rank + 1) * local) for p in range(parts)]
    shard_regions = tuple(tuple(span if d == dim else (0, size) for d, size in enumerate(shape)) for span in spans)
    local_shape = tuple(local if d == dim else size for d, size in enumerate(shape))
    if parts == 1 or dim:
        return (parts, *local_shape) if parts > 1 else local_shape, shard_regions
    return (parts * local, *local_shape[1:]), shard_regions


def mark_shards(module: nn.Module) -> None:
    """Mark which of the module's own parameters are tensor-parallel shards, for gradient norms.

    DeepSpeed (and megadit's stage 0) counts an unmarked parameter on the first tensor-parallel rank alone: without the
    mark the gradient norm is too small and clipping too weak, without an error.
    """
    for name in getattr(module, "param_regions", {}):
        getattr(module, name).tensor_model_parallel = True


def is_shard(parameter: nn.Parameter) -> bool:
    """Whether other tensor-parallel ranks hold other elements of this parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))
