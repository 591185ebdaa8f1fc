"""Where every member of every sample lies, so that any sample is read without looking through its tar."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megadit.data.shards.scanning import Entry, Survey, scan
from megadit.data.shards.shard_files import JSON, KNOWN, LABEL, ShardFile, shown_name
from megadit.errors import UserError
from megadit.files.paths import atomic_write
from megadit.files.text import name_bytes

_VERSION = "1"  # of the file
_SCAN = "2"  # of what a scan finds and refuses: what an older one kept in the cache is not taken
_SURVEY = "survey"  # only where it tells something
_TEXTS, _NUMBERS = ("members", "keys", "bases", "classes"), ("shard", "offsets", "sizes", "labels")


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Samples of several tars, in order. members: the columns of offsets and sizes, int64 (N, M); -1: not there.

    shard, labels: int64 (N,); label -1: none.  classes: names by label; empty where the labels are numbers that nobody
    has named yet.  survey: what else the scan has seen; empty for tars of megadit.
    """

    members: tuple[str, ...]
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    bases: tuple[str, ...]
    classes: tuple[str, ...]
    survey: Survey = field(default_factory=Survey)

    def __len__(self) -> int:
        return len(self.keys)

    def counts(self, shards: int) -> list[int]:
        """Samples of each of so many shards."""
        return np.bincount(self.shard, minlength=shards).tolist()

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether every member lies in one of tars of so many bytes."""
        if not len(self):
            return True
        if self.shard.max() >= len(sizes):
            return False
        ends = np.array(sizes, dtype=np.int64)[self.shard][:, None]
        return not bool((self.offsets > ends - self.sizes).any())

    def place(self, sample: int, member: str) -> tuple[int, int] | None:
        """(offset, size) of a member; None if the sample has none."""
        if member not in self.members:
            return None
        column = self.members.index(member)
        size = int(self.sizes[sample, column])
        return None if size < 0 else (int(self.offsets[sample, column]), size)

    def lacking(self, *members: str) -> np.ndarray:
        """The samples without any of the members."""
        columns = [self.members.index(member) for member in members if member in self.members]
        return np.flatnonzero((self.sizes[:, columns] < 0).all(axis=1))

    def label_member(self, sample: int) -> str:
        """The member that a sample's label is from."""
        return f"{shown_name(self.keys[sample])}.{LABEL if self.place(sample, LABEL) else JSON}"

    def of_shards(self, numbers: Sequence[int]) -> SampleIndex:
        """The samples of these shards, in their order, which are then 0, 1, 2, ..."""
        chosen = np.concatenate([np.flatnonzero(self.shard == number) for number in numbers])
        renumbered = np.concatenate(
            [np.full(int((self.shard == number).sum()), new) for new, number in enumerate(numbers)]
        )
        return replace(
            self, shard=renumbered.astype(np.int64), offsets=self.offsets[chosen], sizes=self.sizes[chosen],
            labels=self.labels[chosen], keys=tuple(self.keys[i] for i in chosen),
            bases=tuple(self.bases[i] for i in chosen),
        )  # fmt: skip


def build_index(
    shards: Sequence[Sequence[Entry]],
    classes: Sequence[str] | None = None,
    survey: Survey | None = None,
    tars: Sequence[str] = (),
) -> SampleIndex:
    """The index of scanned tars. classes: names of the labels; None: found in them, as image folders number theirs.

    Labels that are names in some samples and numbers in others are none; ``survey`` then tells it, of ``tars`` with
    these paths.
    """
    entries = [entry for shard in shards for entry in shard]
    survey = Survey() if survey is None else survey
    members = tuple(name for name in KNOWN if any(name in entry.places for entry in entries))
    places = np.full((len(entries), len(members), 2), -1, dtype=np.int64)
    for row, entry in enumerate(entries):
        for column, name in enumerate(members):
            if name in entry.places:
                places[row, column] = entry.places[name]
    names = _names(shards, survey, tars) if classes is None else tuple(classes)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers.get(entry.label, -1) if isinstance(entry.label, str) else entry.label for entry in entries]
    return SampleIndex(
        members=members,
        shard=np.repeat(np.arange(len(shards), dtype=np.int64), [len(shard) for shard in shards]),
        offsets=places[..., 0].copy(),
        sizes=places[..., 1].copy(),
        labels=np.array([-1 if label is None else label for label in labels], dtype=np.int64).reshape(-1),
        keys=tuple(entry.key for entry in entries),
        bases=tuple(entry.base for entry in entries),
        classes=names,
        survey=survey,
    )


def _names(shards: Sequence[Sequence[Entry]], survey: Survey, tars: Sequence[str]) -> tuple[str, ...]:
    """Labels that are names, sorted; none where they are numbers."""
    first: dict[type, str] = {}
    names = set()
    for number, entries in enumerate(shards):
        for entry in entries:
            if isinstance(entry.label, str):
                names.add(entry.label)
            if type(entry.label) not in first:
                where = f" in {tars[number]}" if tars else ""
                first[type(entry.label)] = f"{shown_name(str(entry.label))} of {shown_name(entry.key)}{where}"
    if str in first and int in first:
        survey.note_label(
            f"data.path: labels of the tars are names ({first[str]}) and numbers ({first[int]}); use one of the two"
        )
    return tuple(sorted(names))


def save_index(index: SampleIndex, path: Path) -> None:
    """Write the index as safetensors; it appears whole or not at all."""
    from safetensors.numpy import save

    arrays = {name: np.frombuffer(_joined(getattr(index, name)), dtype=np.uint8) for name in _TEXTS}
    arrays |= {name: getattr(index, name) for name in _NUMBERS}
    if index.survey != Survey():
        arrays[_SURVEY] = np.frombuffer(index.survey.to_json().encode(), dtype=np.uint8)
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(arrays, {"version": _VERSION}))  # save_file would make it its owner's alone


def load_index(path: Path) -> SampleIndex:
    """The index that ``save_index`` wrote. Raises UserError if it is missing or damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("version") != _VERSION:
                raise ValueError("it is of another version of megadit")
            a = {name: file.get_tensor(name) for name in (*_TEXTS, *_NUMBERS)}
            survey = Survey.from_json(file.get_tensor(_SURVEY).tobytes()) if _SURVEY in set(file.keys()) else Survey()
        texts: dict[str, Any] = {name: _parted(a[name].tobytes()) for name in _TEXTS}
        index = SampleIndex(**texts, **{name: a[name] for name in _NUMBERS}, survey=survey)
        _check(index)
    except FileNotFoundError:
        raise UserError(f"data.path: {path} is missing; copy the whole folder of the tars") from None
    except Exception as error:  # whatever safetensors and numpy say about damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data.path: {path} cannot be read ({reason}); copy it again, or write the set again"
        ) from error
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


def _parted(data: bytes) -> tuple[str, ...]:
    return tuple(data.decode("utf-8", "surrogateescape").split("\0")[:-1])


def cached_index(shards: Sequence[ShardFile]) -> SampleIndex:
    """The index of tars that have no manifest: from the user's cache if these files were scanned before, else scanned.

    Raises UserError as ``scan`` does.
    """
    digest = hashlib.sha256(f"{_VERSION}.{_SCAN}".encode())
    for shard in shards:
        digest.update(name_bytes(f"{os.path.realpath(shard.path)}\0{shard.size}\0{shard.changed_ns}\0"))
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(root).expanduser() / "megadit" / "tars" / f"{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        with contextlib.suppress(UserError):  # a damaged cache is made again
            index = load_index(path)
            if index.fits([shard.size for shard in shards]):
                return index
    survey = Survey()
    entries = [scan(shard, survey) for shard in shards]
    index = build_index(entries, survey=survey, tars=[shard.path for shard in shards])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(index, path)
    except OSError:
        pass  # a home that cannot be written costs the next start another scan
    return index
