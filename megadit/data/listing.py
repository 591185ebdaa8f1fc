"""What a set of images is read from: names and sizes of its files in their order, told apart without opening one.

A checkpoint keeps a ``Listing`` as a record of bounded size: counts, a digest, and at evenly spaced places the name,
the size and the digest up to there. With these a later listing is compared, and its first difference named.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from megadit.files.text import name_bytes

_MARKS = 1024  # places that a record keeps: every entry of a set that has no more
_THREADS, _PER_THREAD = 16, 4096  # a file system in the network answers many questions at once
MISSING = -1  # the size of a file that is not there


@dataclass(frozen=True, eq=False)
class Listing:
    """The entries of a set in its order, and what of its images is known without opening them.

    unit: what an entry is (image, shard, file).  names: as the file system has them, relative to the set's folder.
    sizes: in bytes.  labels: int64 (N,), of the N images.  captions: N texts; None: they lie in the entries.
    detail: a digest of what names and sizes of the entries do not tell, such as the samples in shards.
    """

    unit: str
    names: Sequence[bytes]
    sizes: Sequence[int]
    labels: np.ndarray
    captions: Sequence[str] | None = None
    detail: str = ""


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits of SHA-256 over ``parts``."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def sizes_of(folder: str, names: Sequence[str]) -> list[int]:
    """The size of every file below ``folder`` in bytes; ``MISSING`` where there is none, or a folder."""
    if len(names) <= _PER_THREAD:
        return [_size(folder, name) for name in names]
    parts = [names[first : first + _PER_THREAD] for first in range(0, len(names), _PER_THREAD)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda part: [_size(folder, name) for name in part], parts)
        return [size for part in found for size in part]


def _size(folder: str, name: str) -> int:
    try:
        facts = os.stat(f"{folder}/{name}")  # a Path costs ten times as much
    except OSError:
        return MISSING
    return MISSING if stat.S_ISDIR(facts.st_mode) else facts.st_size


def record(listing: Listing) -> dict[str, Any]:
    """The listing as a checkpoint keeps it, of bounded size. marks: "place size digest name" each."""
    count = len(listing.names)
    shown = min(count, _MARKS)
    places = [(number + 1) * count // shown - 1 for number in range(shown)]
    marks = zip(places, _digests(listing, places), strict=True)
    return {
        "unit": listing.unit,
        "count": count,
        "bytes": sum(size for size in listing.sizes if size != MISSING),
        "detail": listing.detail,
        "marks": [f"{place} {listing.sizes[place]} {seen} {_text(listing.names[place])}" for place, seen in marks],
    }


def _digests(listing: Listing, places: Sequence[int]) -> Iterator[str]:
    """The digest of the entries up to and with each of ``places``, which ascend."""
    seen, first = hashlib.sha256(), 0
    for place in places:
        entries = zip(listing.names[first : place + 1], listing.sizes[first : place + 1], strict=True)
        seen.update(b"".join(b"%b\0%d\0" % entry for entry in entries))
        first = place + 1
        yield seen.hexdigest()[:12]


def same_files(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two records are of the same entries in the same order."""
    return all(before[key] == after[key] for key in ("unit", "count", "detail", "marks"))


def first_difference(before: Mapping[str, Any], listing: Listing) -> str:
    """Where ``listing`` leaves the record ``before``, as words: the entry, or the two between which it lies."""
    marks = [_Mark.read(text) for text in before["marks"]]
    count = len(listing.names)
    known = [mark for mark in marks if mark.place < count]
    found = _digests(listing, [mark.place for mark in known])
    equal = next((n for n, (mark, seen) in enumerate(zip(known, found, strict=True)) if mark.seen != seen), len(known))
    if equal == len(marks):
        if count == before["count"]:
            return f"what lies in the {listing.unit}s, whose names and sizes are the same"
        return f"{_text(listing.names[before['count']])} is new"
    mark = marks[equal]
    first = marks[equal - 1].place + 1 if equal else 0
    if first < mark.place:
        after = f"after {marks[equal - 1].name}, " if equal else ""
        return f"among the {listing.unit}s {after}up to {mark.name}"
    if mark.place >= count:
        return f"{mark.name} is gone"
    present = _text(listing.names[mark.place])
    if present == mark.name:
        return f"{present} has {_bytes(listing.sizes[mark.place])} and had {_bytes(mark.size)}"
    if name_bytes(mark.name) not in set(listing.names):
        return f"{mark.name} is gone"
    return f"{present} is {'in the place of ' + mark.name if any(m.name == present for m in marks) else 'new'}"


@dataclass(frozen=True)
class _Mark:
    place: int
    size: int
    seen: str
    name: str

    @classmethod
    def read(cls, text: str) -> _Mark:
        place, size, seen, name = text.split(" ", 3)
        return cls(int(place), int(size), seen, name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(size: int) -> str:
    return "no file" if size == MISSING else f"{size:,} bytes"
