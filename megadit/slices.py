"""Which elements of a global parameter a rank's shard holds, and what to copy from one sharding into another.

A tensor-parallel rank holds a shard of a parameter: rows, columns, or several blocks of them (the q, k and v rows of
some heads). Its *shard regions* say which: one ``(low, high)`` per dimension and region; the flattened regions stand
one after the other. None is the global parameter. ZeRO cuts the flattened shard once more, into ranges [start, stop).
Both are turned into *spans* of the flattened global parameter, in which any two shardings can be compared.

Example: W of shape (4, 6) on 2 tensor-parallel ranks, which hold 3 columns each, and 3 data-parallel ranks of ZeRO.
W[i, j] is element 6 i + j of the flattened parameter::

             tensor rank 0   tensor rank 1      shard of tensor rank 1, flattened, and its ranges of ZeRO
    row 0       0  1  2    |    3  4  5
    row 1       6  7  8    |    9 10 11         | 3  4  5  9 | 10 11 15 16 | 17 21 22 23 |
    row 2      12 13 14    |   15 16 17           start 0      start 4       start 8
    row 3      18 19 20    |   21 22 23           file of data rank 0, 1, 2 (each with tensor rank 1)

The second of these files holds, in its 16 bytes, elements 10 and 11 of W and then 15 and 16:

>>> shape, rank_1 = (4, 6), (((0, 4), (3, 6)),)
>>> contiguous_spans(shape, rank_1, 4, 8)
[Span(first=10, length=2, offset=0), Span(first=15, length=2, offset=2)]

Resumed on two ranks of ZeRO without tensor parallelism, the first rank needs elements [0, 12) of W. Of the first file
it copies elements 0 to 2 (bytes 0 to 12) to 3, and element 3 to 9; of the second file elements 0 and 1 (bytes 0 to 8)
to 10; of the third nothing. The other six come from the files of tensor rank 0:

>>> pending = PendingSpans(contiguous_spans(shape, None, 0, 12))
>>> pending.take(contiguous_spans(shape, rank_1, 0, 4))
[Copy(source=0, target=3, length=3), Copy(source=3, target=9, length=1)]
>>> pending.take(contiguous_spans(shape, rank_1, 4, 8))
[Copy(source=0, target=10, length=2)]
>>> pending.take(contiguous_spans(shape, rank_1, 8, 12))
[]
>>> pending.remaining
6
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

Region = tuple[tuple[int, int], ...]
ShardRegions = tuple[Region, ...]


class Span(NamedTuple):
    """``length`` elements that are contiguous both in the global parameter, from ``first``, and in a shard's range,
    from ``offset``."""

    first: int
    length: int
    offset: int


class Copy(NamedTuple):
    """``length`` elements to copy, from offset ``source`` of a stored range to offset ``target`` of the one to fill."""

    source: int
    target: int
    length: int


def contiguous_spans(shape: Sequence[int], shard_regions: ShardRegions | None, start: int, stop: int) -> list[Span]:
    """The spans of elements [start, stop) of a shard of a parameter of ``shape``, ordered by ``first``."""
    if shard_regions is None:
        return [Span(start, stop - start, 0)] if stop > start else []
    spans, before = [], 0
    for region in shard_regions:
        for first, count in _region_spans(shape, region):
            low, high = max(start, before), min(stop, before + count)
            if low < high:
                spans.append(Span(first + low - before, high - low, low - start))
            before += count
    return sorted(spans)


def _region_spans(shape: Sequence[int], region: Region) -> list[tuple[int, int]]:
    """(first element, length) of each contiguous span of a region, in the order of its elements."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    full = len(shape)  # the region takes all of the dimensions from this one on
    while full > 0 and region[full - 1] == (0, shape[full - 1]):
        full -= 1
    if full == 0:
        return [(0, math.prod(shape))]
    low, high = region[full - 1]
    stride = strides[full - 1]
    outer = itertools.product(*(range(*region[d]) for d in range(full - 1)))
    return [
        (sum(i * s for i, s in zip(index, strides, strict=False)) + low * stride, (high - low) * stride)
        for index in outer
    ]


class PendingSpans:
    """The spans of a tensor to fill that are still to be read; they shrink, so that nothing is read twice.

    ``spans`` must be sorted by ``first``, as ``contiguous_spans`` returns them.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = list(spans)

    @property
    def remaining(self) -> int:
        """Elements still to be read."""
        return sum(span.length for span in self._spans)

    def take(self, stored: Sequence[Span]) -> list[Copy]:
        """What a stored range has of the pending spans, ordered by ``source``; it is pending no longer.

        ``stored`` must be sorted by ``first``, too: both are walked once, side by side.
        """
        copies, pending, i = [], [], 0
        for span in self._spans:
            first, end = span.first, span.first + span.length
            while i < len(stored) and stored[i].first + stored[i].length <= first:
                i += 1
            j = i
            while j < len(stored) and stored[j].first < end:
                low, high = max(first, stored[j].first), min(end, stored[j].first + stored[j].length)
                if low > first:
                    pending.append(Span(first, low - first, span.offset + first - span.first))
                copies.append(
                    Copy(stored[j].offset + low - stored[j].first, span.offset + low - span.first, high - low)
                )
                first, j = high, j + 1
            if first < end:
                pending.append(Span(first, end - first, span.offset + first - span.first))
        self._spans = pending
        return sorted(copies)
