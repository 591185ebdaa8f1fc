"""Weights that are not finite: found in one pass, counted and named."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PIECE = 1 << 24  # values that are counted at once


@dataclass
class NonFiniteCount:
    """Values of one tensor: all, and those that are NaN, infinite, or beyond float32's largest."""

    total: int = 0
    nan: int = 0
    infinite: int = 0
    beyond: int = 0

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite or self.beyond)

    def __str__(self) -> str:
        kinds = {"NaN": self.nan, "infinite": self.infinite, "beyond float32's range": self.beyond}
        return f"{', '.join(f'{n:,} {kind}' for kind, n in kinds.items() if n)} of {self.total:,} values"

    def add(self, values: Tensor) -> None:
        """Count ``values``, which are floating-point numbers, as float32 would hold them."""
        self.total += values.numel()
        for piece in values.detach().reshape(-1).split(_PIECE):
            single = piece.float()  # which float8 needs, and where float64 may end
            if all_finite(single):
                continue
            nan, infinite = int(single.isnan().sum()), int(single.isinf().sum())
            true = int(piece.isinf().sum()) if piece.dtype == torch.float64 else infinite
            self.nan += nan
            self.infinite += true
            self.beyond += infinite - true


@dataclass
class NonFiniteCounts:
    """Counts by name; tensors that are not of floating point are passed over."""

    counts: dict[str, NonFiniteCount] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """Count the values of a tensor, or of a part of it."""
        if values.is_floating_point():
            self.counts.setdefault(name, NonFiniteCount()).add(values)

    def __str__(self) -> str:
        """ "'x' holds 2 NaN of 9 values, and so do 3 more tensors"; empty where all values are finite."""
        bad = [(name, count) for name, count in self.counts.items() if count]
        if not bad:
            return ""
        first = f"'{bad[0][0]}' holds {bad[0][1]}"
        return first if len(bad) == 1 else f"{first}, and so do {len(bad) - 1} more tensors"


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite, in one pass and without memory of their size."""
    if not values.numel():
        return True
    low, high = values.aminmax()  # NaN if any is
    return math.isfinite(float(low)) and math.isfinite(float(high))


def describe_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """``str(NonFiniteCounts)`` of the tensors, those on the meta device left out; empty where all values are finite."""
    counts = NonFiniteCounts()
    for name, values in tensors:
        if values.is_floating_point() and values.device.type != "meta":
            counts.add(name, values)
    return str(counts)
