"""The sample index: the span (offset, size) of every member of every sample, so that any sample is read by itself.

Columns are the members that occur; -1 stands for a member that a sample does not have:

                       offsets              sizes
    keys     shard     png    txt    cls    png    txt    cls    labels
    00000    0         512    2048   -1     1200   31     -1     3           sample 0 is in the first tar
    00001    0         3072   5120   -1     1800   18     -1     0
    00002    1         512    -1     2560   1500   -1     1      7           sample 2 is in the second

``shards[index.shard[i]].read(*index.span(i, "png"))`` gives the bytes of image i.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megadit.data.shards.naming import JSON, KNOWN, LABEL, shown_name
from megadit.data.shards.scanning import ByteRange, ScanSummary, TarSample, scan
from megadit.data.shards.shard_files import ShardFile
from megadit.errors import UserError, one_line
from megadit.files.paths import atomic_write, user_cache
from megadit.files.text import name_bytes

_VERSION = "1"  # of the file
_SCAN = "2"  # of what a scan finds and refuses: a cached index of an older one is not used
_SUMMARY = "survey"  # in the file only where there are remarks
_TEXTS, _NUMBERS = ("members", "keys", "bases", "classes"), ("shard", "offsets", "sizes", "labels")


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """N samples of several tars, in order. members: the M columns of offsets and sizes, int64 (N, M); -1: not there.

    shard, labels: int64 (N,); label -1: none.  classes: names by label; empty where the labels are numbers without
    names.  summary: what else the scan found; empty for tars of megadit.
    """

    members: tuple[str, ...]
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    bases: tuple[str, ...]
    classes: tuple[str, ...]
    summary: ScanSummary = field(default_factory=ScanSummary)

    def __len__(self) -> int:
        return len(self.keys)

    def counts(self, shards: int) -> list[int]:
        """The number of samples in each of ``shards`` tars."""
        return np.bincount(self.shard, minlength=shards).tolist()

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether every member lies within its tar. sizes: bytes of each tar."""
        if not len(self):
            return True
        if self.shard.max() >= len(sizes):
            return False
        ends = np.array(sizes, dtype=np.int64)[self.shard][:, None]
        return not bool((self.offsets > ends - self.sizes).any())

    def span(self, sample: int, member: str) -> ByteRange | None:
        """(offset, size) of a member; None if the sample has none."""
        if member not in self.members:
            return None
        column = self.members.index(member)
        size = int(self.sizes[sample, column])
        return None if size < 0 else (int(self.offsets[sample, column]), size)

    def without(self, *members: str) -> np.ndarray:
        """The samples that have none of the members."""
        columns = [self.members.index(member) for member in members if member in self.members]
        return np.flatnonzero((self.sizes[:, columns] < 0).all(axis=1))

    def label_member(self, sample: int) -> str:
        """The member that a sample's label is from."""
        return f"{shown_name(self.keys[sample])}.{LABEL if self.span(sample, LABEL) else JSON}"

    def of_shards(self, numbers: Sequence[int]) -> SampleIndex:
        """The samples of these shards, which are renumbered 0, 1, 2, ... in the order given."""
        chosen = np.concatenate([np.flatnonzero(self.shard == number) for number in numbers])
        counts = [int((self.shard == number).sum()) for number in numbers]
        return replace(
            self, shard=np.repeat(np.arange(len(numbers), dtype=np.int64), counts),
            offsets=self.offsets[chosen], sizes=self.sizes[chosen], labels=self.labels[chosen],
            keys=tuple(self.keys[i] for i in chosen), bases=tuple(self.bases[i] for i in chosen),
        )  # fmt: skip


def build_index(
    shards: Sequence[Sequence[TarSample]],
    classes: Sequence[str] | None = None,
    summary: ScanSummary | None = None,
    tars: Sequence[str] = (),
) -> SampleIndex:
    """The index of scanned tars. classes: names of the labels; None: the names that occur, numbered in sorted order.

    Where labels are names in some samples and numbers in others, they cannot be used: ``summary`` notes it, by the
    paths ``tars``.
    """
    samples = [sample for shard in shards for sample in shard]
    summary = ScanSummary() if summary is None else summary
    members = tuple(name for name in KNOWN if any(name in sample.spans for sample in samples))
    spans = np.array(
        [[sample.spans.get(name, (-1, -1)) for name in members] for sample in samples], dtype=np.int64
    ).reshape(len(samples), len(members), 2)
    names = _class_names(shards, summary, tars) if classes is None else tuple(classes)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(sample.label, -1) if isinstance(sample.label, str) else sample.label for sample in samples]
    return SampleIndex(
        members=members,
        shard=np.repeat(np.arange(len(shards), dtype=np.int64), [len(shard) for shard in shards]),
        offsets=spans[..., 0].copy(),
        sizes=spans[..., 1].copy(),
        labels=np.array([-1 if label is None else label for label in labels], dtype=np.int64).reshape(-1),
        keys=tuple(sample.key for sample in samples),
        bases=tuple(sample.base for sample in samples),
        classes=names,
        summary=summary,
    )


def _class_names(shards: Sequence[Sequence[TarSample]], summary: ScanSummary, tars: Sequence[str]) -> tuple[str, ...]:
    """Labels that are names, sorted; none where they are numbers."""
    first: dict[type, str] = {}
    names = set()
    for number, samples in enumerate(shards):
        for sample in samples:
            if isinstance(sample.label, str):
                names.add(sample.label)
            if type(sample.label) not in first:
                where = f" in {tars[number]}" if tars else ""
                first[type(sample.label)] = f"{shown_name(str(sample.label))} of {shown_name(sample.key)}{where}"
    if str in first and int in first:
        summary.note_label(
            f"data.path: labels of the tars are names ({first[str]}) and numbers ({first[int]}); use one of the two"
        )
    return tuple(sorted(names))


def save_index(index: SampleIndex, path: Path) -> None:
    """Write the index as safetensors; it appears whole or not at all."""
    from safetensors.numpy import save

    arrays = {name: np.frombuffer(_joined(getattr(index, name)), dtype=np.uint8) for name in _TEXTS}
    arrays |= {name: getattr(index, name) for name in _NUMBERS}
    if index.summary != ScanSummary():
        arrays[_SUMMARY] = np.frombuffer(index.summary.to_json().encode(), dtype=np.uint8)
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(arrays, {"version": _VERSION}))  # save_file would make it its owner's alone


def load_index(path: Path) -> SampleIndex:
    """The index that ``save_index`` wrote. Raises UserError if it is missing or damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("version") != _VERSION:
                raise ValueError("it is of another version of megadit")
            names = (*_TEXTS, *_NUMBERS, *({_SUMMARY} & set(file.keys())))
            arrays = {name: file.get_tensor(name) for name in names}
        texts: dict[str, Any] = {name: _split(arrays[name].tobytes()) for name in _TEXTS}
        summary = ScanSummary.from_json(arrays[_SUMMARY].tobytes()) if _SUMMARY in arrays else ScanSummary()
        index = SampleIndex(**texts, **{name: arrays[name] for name in _NUMBERS}, summary=summary)
        _check(index)
    except FileNotFoundError:
        raise UserError(f"data.path: {path} is missing; copy the whole folder of the tars") from None
    except Exception as error:  # whatever safetensors and numpy say about damaged files
        problem = f"{path} cannot be read ({one_line(error)})"
        raise UserError(f"data.path: {problem}; copy it again, or write the set again") from error
    return index


def _check(index: SampleIndex) -> None:
    """Raise ValueError where the parts of an index do not fit together."""
    rows, columns = len(index), len(index.members)
    shapes = {(rows,): (index.shard, index.labels), (rows, columns): (index.offsets, index.sizes)}
    if len(index.bases) != rows or any(part.shape != shape for shape, parts in shapes.items() for part in parts):
        raise ValueError("its parts have different lengths")
    if any(getattr(index, name).dtype != np.int64 for name in _NUMBERS):
        raise ValueError("its numbers are no whole numbers of 64 bits")
    if len(set(index.members) & set(KNOWN)) != columns:
        raise ValueError("it names members that no sample has")
    if rows and (index.shard.min() < 0 or min(index.labels.min(), index.offsets.min(), index.sizes.min()) < -1):
        raise ValueError("it has a number below 0")
    if rows and index.classes and index.labels.max() >= len(index.classes):
        raise ValueError("a label is beyond its classes")


def _joined(texts: Sequence[str]) -> bytes:
    return b"".join(name_bytes(text) + b"\0" for text in texts)


def _split(data: bytes) -> tuple[str, ...]:
    return tuple(data.decode("utf-8", "surrogateescape").split("\0")[:-1])


def cached_index(shards: Sequence[ShardFile]) -> SampleIndex:
    """The index of tars without a manifest: from the user's cache if these files were scanned before, else scanned.

    Raises UserError as ``scan`` does.
    """
    digest = hashlib.sha256(f"{_VERSION}.{_SCAN}".encode())
    for shard in shards:
        digest.update(name_bytes(f"{os.path.realpath(shard.path)}\0{shard.size}\0{shard.changed_ns}\0"))
    path = user_cache() / "tars" / f"{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        with contextlib.suppress(UserError):  # a damaged cache is made again
            index = load_index(path)
            if index.fits([shard.size for shard in shards]):
                return index
    summary = ScanSummary()
    samples = [scan(shard, summary) for shard in shards]
    index = build_index(samples, summary=summary, tars=[shard.path for shard in shards])
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start another scan
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(index, path)
    return index
