"""The files that a set of images is read from: names and sizes in their order, compared without opening one.

A checkpoint stores a ``Listing`` as a record of bounded size: counts, a digest, and evenly spaced entries, each with
name, size and the digest of all entries up to it. With these a later listing is compared, and its first difference is
named.
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

_MARKS = 1024  # of a record: every entry of a set that has no more
_THREADS, _PER_THREAD = 16, 4096  # a network file system answers many requests at once
MISSING = -1  # the size of a file that is not there


@dataclass(frozen=True, eq=False)
class Listing:
    """The entries of a set in its order, with labels and captions as far as they are known without opening an image.

    unit: what an entry is (image, shard, file).  names: as the file system has them, relative to the set's folder.
    sizes: in bytes.  labels: int64 (N,), of the N images.  captions: N texts; None: they are inside the entries.
    detail: a digest of what names and sizes do not show, such as the samples in shards.
    """

    unit: str
    names: Sequence[bytes]
    sizes: Sequence[int]
    labels: np.ndarray
    captions: Sequence[str] | None = None
    detail: str = ""


def digest(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits of SHA-256 over ``parts``."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part)
    return sha256.hexdigest()[:16]


def sizes_of(folder: str, names: Sequence[str]) -> list[int]:
    """The size of every file below ``folder`` in bytes; ``MISSING`` where there is none, or a folder."""
    if len(names) <= _PER_THREAD:
        return [_size(folder, name) for name in names]
    parts = [names[first : first + _PER_THREAD] for first in range(0, len(names), _PER_THREAD)]
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = pool.map(lambda part: [_size(folder, name) for name in part], parts)
        return [size for part in sizes for size in part]


def _size(folder: str, name: str) -> int:
    try:
        facts = os.stat(f"{folder}/{name}")  # a Path costs ten times as much
    except OSError:
        return MISSING
    return MISSING if stat.S_ISDIR(facts.st_mode) else facts.st_size


def record(listing: Listing) -> dict[str, Any]:
    """The listing as a checkpoint stores it, of bounded size. marks: "index size digest name" each."""
    count = len(listing.names)
    shown = min(count, _MARKS)
    indices = [(number + 1) * count // shown - 1 for number in range(shown)]
    marks = zip(indices, _digests(listing, indices), strict=True)
    return {
        "unit": listing.unit,
        "count": count,
        "bytes": sum(size for size in listing.sizes if size != MISSING),
        "detail": listing.detail,
        "marks": [f"{i} {listing.sizes[i]} {digest} {_text(listing.names[i])}" for i, digest in marks],
    }


def _digests(listing: Listing, indices: Sequence[int]) -> Iterator[str]:
    """The digest of all entries up to each of ``indices``, which ascend, including it."""
    sha256, first = hashlib.sha256(), 0
    for last in indices:
        entries = zip(listing.names[first : last + 1], listing.sizes[first : last + 1], strict=True)
        sha256.update(b"".join(b"%b\0%d\0" % entry for entry in entries))
        first = last + 1
        yield sha256.hexdigest()[:12]


def same_files(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two records are of the same entries in the same order."""
    return all(before[key] == after[key] for key in ("unit", "count", "detail", "marks"))


def first_difference(before: Mapping[str, Any], listing: Listing) -> str:
    """Where ``listing`` begins to differ from the record ``before``, in words: the entry, or the two around it."""
    marks = [_Mark.read(text) for text in before["marks"]]
    count = len(listing.names)
    present = [mark for mark in marks if mark.index < count]
    digests = _digests(listing, [mark.index for mark in present])
    differs = (mark.digest != digest for mark, digest in zip(present, digests, strict=True))
    equal = next((n for n, different in enumerate(differs) if different), len(present))
    if equal == len(marks):
        if count == before["count"]:
            return f"what lies in the {listing.unit}s, whose names and sizes are the same"
        return f"{_text(listing.names[before['count']])} is new"
    mark = marks[equal]
    first = marks[equal - 1].index + 1 if equal else 0
    if first < mark.index:
        after = f"after {marks[equal - 1].name}, " if equal else ""
        return f"among the {listing.unit}s {after}up to {mark.name}"
    if mark.index >= count:
        return f"{mark.name} is gone"
    name = _text(listing.names[mark.index])
    if name == mark.name:
        return f"{name} has {_bytes(listing.sizes[mark.index])} and had {_bytes(mark.size)}"
    if name_bytes(mark.name) not in set(listing.names):
        return f"{mark.name} is gone"
    return f"{name} is {'in the place of ' + mark.name if any(m.name == name for m in marks) else 'new'}"


@dataclass(frozen=True)
class _Mark:
    """An entry of a record. digest: of all entries up to this one."""

    index: int
    size: int
    digest: str
    name: str

    @classmethod
    def read(cls, text: str) -> _Mark:
        index, size, digest, name = text.split(" ", 3)
        return cls(int(index), int(size), digest, name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _bytes(size: int) -> str:
    return "no file" if size == MISSING else f"{size:,} bytes"
