"""Which elements of a whole parameter a piece of it holds, as runs of the flattened parameter.

A tensor-parallel rank holds a slice of a parameter: rows, columns, or several blocks of them (the q, k and v rows of
some heads). A slice is a list of boxes, one ``(low, high)`` per dimension each, whose flattened contents stand one
after the other; None is the whole parameter. A piece is an index range of its slice, so that ZeRO may cut what tensor
parallelism has cut before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Box = tuple[tuple[int, int], ...]
Boxes = tuple[Box, ...]


class Run(NamedTuple):
    """``length`` elements that are neighbours both in the whole parameter, from ``first``, and in a piece, ``at``."""

    first: int
    length: int
    at: int


def runs(shape: Sequence[int], boxes: Boxes | None, start: int, stop: int) -> list[Run]:
    """The runs of elements [start, stop) of a slice of a parameter of ``shape``, by their place in the parameter."""
    if boxes is None:
        return [Run(start, stop - start, 0)] if stop > start else []
    found, before = [], 0
    for box in boxes:
        for first, count in _box_runs(shape, box):
            low, high = max(start, before), min(stop, before + count)
            if low < high:
                found.append(Run(first + low - before, high - low, low - start))
            before += count
    return sorted(found)


def _box_runs(shape: Sequence[int], box: Box) -> list[tuple[int, int]]:
    """(first element, length) of each unbroken stretch of a box, in the order of its elements."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    whole = len(shape)  # from this dimension on the box takes everything
    while whole > 0 and box[whole - 1] == (0, shape[whole - 1]):
        whole -= 1
    if whole == 0:
        return [(0, math.prod(shape))]
    low, high = box[whole - 1]
    stride = strides[whole - 1]
    outer = itertools.product(*(range(*box[d]) for d in range(whole - 1)))
    return [
        (sum(i * s for i, s in zip(index, strides, strict=False)) + low * stride, (high - low) * stride)
        for index in outer
    ]


class Wanted:
    """What is still to be read of a target's runs; shrinks as pieces are found, so that nothing is read twice."""

    def __init__(self, target: Sequence[Run]) -> None:
        self._open = list(target)

    @property
    def left(self) -> int:
        """Elements still to be read."""
        return sum(run.length for run in self._open)

    def take(self, stored: Sequence[Run]) -> list[tuple[int, int, int]]:
        """What of ``stored`` is wanted, as (place in the piece, place in the target, count) by place in the piece."""
        taken, rest, i = [], [], 0
        for run in self._open:
            first, end = run.first, run.first + run.length
            while i < len(stored) and stored[i].first + stored[i].length <= first:
                i += 1
            j = i
            while j < len(stored) and stored[j].first < end:
                low, high = max(first, stored[j].first), min(end, stored[j].first + stored[j].length)
                if low > first:
                    rest.append(Run(first, low - first, run.at + first - run.first))
                taken.append((stored[j].at + low - stored[j].first, run.at + low - run.first, high - low))
                first, j = high, j + 1
            if first < end:
                rest.append(Run(first, end - first, run.at + first - run.first))
        self._open = rest
        return sorted(taken)
