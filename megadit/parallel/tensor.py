"""Tensor parallelism as layers see it: this rank's share of heads, channels and tokens.

A model is built the same way for any layout: inside ``with building(layout)`` the layers that can be cut ask for the
layout and make their share of their parameters; what they declare (``ParamSpec``) stays global. Which elements a share
holds is said by shard regions (``megadit.slices``) in the layer's ``param_regions``, by the parameter's local name; a
parameter that is not named there is whole on every rank.
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
    """This rank, ``rank`` of ``size`` that share every layer.

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

    def local_size(self, size: int, what: str) -> int:
        """``size`` / ranks.

        Raises:
            ValueError: the ranks do not divide it; ``what`` says what it counts.
        """
        if size % self.size:
            raise ValueError(f"{self.size} tensor-parallel ranks do not divide {size} {what}")
        return size // self.size


UNSHARDED = TensorLayout()
_building: ContextVar[TensorLayout] = ContextVar("tensor_layout", default=UNSHARDED)


@contextmanager
def building(layout: TensorLayout | None) -> Iterator[None]:
    """Models built inside hold one rank's share of their parameters (None: all of them)."""
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
    """This rank's share of a parameter of global ``shape``, cut along ``dim``: its local shape and its shard regions.

    ``parts``: how many matrices stand side by side along ``dim`` (3 for q, k and v, 2 for gate and up), each of which
    is cut by itself. Along another dimension than the first a share's pieces lie one after the other, and its shape has
    them in front: (parts, ...).

    Raises:
        ValueError: the ranks do not divide a part.
    """
    part = shape[dim] // parts
    share = layout.local_size(part, f"channels of a parameter of shape {tuple(shape)}")
    spans = [(p * part + layout.rank * share, p * part + (layout.rank + 1) * share) for p in range(parts)]
    shard_regions = tuple(tuple(span if d == dim else (0, size) for d, size in enumerate(shape)) for span in spans)
    piece = tuple(share if d == dim else size for d, size in enumerate(shape))
    if parts == 1 or dim:
        return (parts, *piece) if parts > 1 else piece, shard_regions
    return (parts * share, *piece[1:]), shard_regions


def mark_shards(module: nn.Module) -> None:
    """Tell those who count gradients which of the module's own parameters are shares, held by one rank only.

    DeepSpeed (and megadit's stage 0) counts an unmarked parameter on the first tensor-parallel rank alone: without the
    mark the gradient norm is too small, and clipping too weak, without an error.
    """
    for name in getattr(module, "param_regions", {}):
        getattr(module, name).tensor_model_parallel = True


def is_shard(parameter: nn.Parameter) -> bool:
    """Whether other tensor-parallel ranks hold other elements of this parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))
