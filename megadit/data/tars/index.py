"""Where every member of every sample lies, so that any sample is read without looking through its tar."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megadit.data.tars.handles import ShardFile
from megadit.data.tars.layout import JSON, KNOWN, LABEL, PICKLED, split_member
from megadit.data.tars.members import read_json
from megadit.errors import UserError
from megadit.files import whole_file

_BLOCK = 512
_VERSION = "1"
_TEXTS, _NUMBERS = ("members", "keys", "bases", "classes"), ("shard", "offsets", "sizes", "labels")
_COPY = "copy the tar again, or write it again"


@dataclass(frozen=True)
class Entry:
    """One sample of a tar. places: extension -> (offset, size).  label: number or name; None without.

    base: what the train/validation split goes by.
    """

    key: str
    base: str
    label: int | str | None
    places: dict[str, tuple[int, int]]


def scan(shard: ShardFile) -> list[Entry]:
    """The samples of a tar, from one pass over its headers, its labels and its JSON members.

    Raises UserError where the tar is torn (also between two members), or holds what would have to be unpickled.
    """
    entries = []
    for key, places in _groups(shard):
        label: int | str | None = None
        base = key
        if JSON in places:
            facts = read_json(shard.read(*places[JSON]), f"{key}.json in {shard.path}")
            base = str(facts.get("base", key))
            given = facts.get("label")
            label = given if isinstance(given, int | str) and not isinstance(given, bool) else None
        if LABEL in places:
            text = shard.read(*places[LABEL]).decode("utf-8", "replace").strip()
            label = int(text) if text.isascii() and text.isdigit() else text
        entries.append(Entry(key, base, label, places))
    return entries


def _groups(shard: ShardFile) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Neighbouring members of one key; hidden files and members of no use are passed over."""
    current: str | None = None
    places: dict[str, tuple[int, int]] = {}
    for name, offset, size in _members(shard):
        key, extension = split_member(name)
        if Path(name).name.startswith((".", "__")):
            continue
        if extension.rpartition(".")[2] in PICKLED:
            raise UserError(
                f"data.path: {shard.path} holds {name}, which would have to be unpickled and could run anything; "
                "write arrays as .npy instead, and take it out"
            )
        if key != current:
            if current is not None and places:
                yield current, places
            current, places = key, {}
        if extension in KNOWN:
            places[extension] = (offset, size)
    if current is not None and places:
        yield current, places


def _members(shard: ShardFile) -> Iterator[tuple[str, int, int]]:
    end = 0
    try:
        with tarfile.open(shard.path, "r:") as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # tarfile keeps every member that it has seen
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"data.path: {shard.path} is not a whole, uncompressed tar ({error}); {_COPY}") from None
    except OSError as error:
        raise UserError(f"data.path: cannot read {shard.path} ({error.strerror or error}); {_COPY}") from None
    # A tar cut between two members looks complete to tarfile and WebDataset; only the zero block at its end is missing.
    if shard.size < end + _BLOCK or any(shard.read(end, _BLOCK)):
        raise UserError(f"data.path: {shard.path} is torn: it ends without the mark of a tar's end; {_COPY}")


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Samples of several tars, in order. members: the columns of offsets and sizes, int64 (N, M); -1: not there.

    shard, labels: int64 (N,); label -1: none.  counts: samples of each shard.
    """

    members: tuple[str, ...]
    shard: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...]
    bases: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def counts(self, shards: int) -> list[int]:
        """Samples of each of so many shards."""
        return np.bincount(self.shard, minlength=shards).tolist()

    def place(self, sample: int, member: str) -> tuple[int, int] | None:
        """(offset, size) of a member; None if the sample has none."""
        if member not in self.members:
            return None
        column = self.members.index(member)
        size = int(self.sizes[sample, column])
        return None if size < 0 else (int(self.offsets[sample, column]), size)

    def lacking(self, member: str) -> int | None:
        """The first sample without that member; None if all have it."""
        if member not in self.members:
            return 0
        missing = np.flatnonzero(self.sizes[:, self.members.index(member)] < 0)
        return int(missing[0]) if len(missing) else None

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


def build_index(shards: Sequence[Sequence[Entry]], classes: Sequence[str] | None = None) -> SampleIndex:
    """The index of scanned tars. classes: names of the labels; None: found in them, as image folders number theirs.

    Raises UserError where labels are names in some samples and numbers in others.
    """
    entries = [entry for shard in shards for entry in shard]
    members = tuple(name for name in KNOWN if any(name in entry.places for entry in entries))
    places = np.full((len(entries), len(members), 2), -1, dtype=np.int64)
    for row, entry in enumerate(entries):
        for column, name in enumerate(members):
            if name in entry.places:
                places[row, column] = entry.places[name]
    found = _classes({entry.label for entry in entries} - {None}) if classes is None else tuple(classes)
    numbers = {name: number for number, name in enumerate(found)}
    given = [-1 if entry.label is None else entry.label for entry in entries]
    labels = [numbers.get(label, -1) if isinstance(label, str) else label for label in given]
    return SampleIndex(
        members=members,
        shard=np.repeat(np.arange(len(shards), dtype=np.int64), [len(shard) for shard in shards]),
        offsets=places[..., 0].copy(),
        sizes=places[..., 1].copy(),
        labels=np.array(labels, dtype=np.int64).reshape(-1),
        keys=tuple(entry.key for entry in entries),
        bases=tuple(entry.base for entry in entries),
        classes=found,
    )


def _classes(labels: set[int | str | None]) -> tuple[str, ...]:
    names = sorted(label for label in labels if isinstance(label, str))
    numbers = [label for label in labels if isinstance(label, int)]
    if names and numbers:
        raise UserError(
            f"data.path: labels of the tars are names ({names[0]}) and numbers ({numbers[0]}); use one of the two"
        )
    return tuple(names) if names else tuple(str(label) for label in range(max(numbers, default=-1) + 1))


def save_index(index: SampleIndex, path: Path) -> None:
    """Write the index as safetensors; it appears whole or not at all."""
    from safetensors.numpy import save

    arrays = {name: np.frombuffer(_joined(getattr(index, name)), dtype=np.uint8) for name in _TEXTS}
    arrays |= {name: getattr(index, name) for name in _NUMBERS}
    with whole_file(path) as temporary:
        temporary.write_bytes(save(arrays, {"version": _VERSION}))  # save_file would make it its owner's alone


def load_index(path: Path) -> SampleIndex:
    """The index that ``save_index`` wrote. Raises UserError if it is missing or damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("version") != _VERSION:
                raise ValueError("it is of another version of megadit")
            a = {name: file.get_tensor(name) for name in (*_TEXTS, *_NUMBERS)}
        texts: dict[str, Any] = {name: _parted(a[name].tobytes()) for name in _TEXTS}
        index = SampleIndex(**texts, **{name: a[name] for name in _NUMBERS})
        rows = {len(index.bases), len(index.shard), len(index.labels), len(index.offsets), len(index.sizes)}
        if rows != {len(index)} or index.offsets.shape != index.sizes.shape:
            raise ValueError("its parts have different lengths")
    except FileNotFoundError:
        raise UserError(f"data.path: {path} is missing; copy the whole folder of the tars") from None
    except Exception as error:  # whatever safetensors and numpy say about damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data.path: {path} cannot be read ({reason}); copy it again, or write the set again"
        ) from error
    return index


def _joined(texts: Sequence[str]) -> bytes:
    return "".join(text + "\0" for text in texts).encode("utf-8", "surrogateescape")


def _parted(data: bytes) -> tuple[str, ...]:
    return tuple(data.decode("utf-8", "surrogateescape").split("\0")[:-1])


def cached_index(shards: Sequence[ShardFile]) -> SampleIndex:
    """The index of tars that have no manifest: from the user's cache if these files were scanned before, else scanned.

    Raises UserError as ``scan`` does.
    """
    digest = hashlib.sha256(_VERSION.encode())
    for shard in shards:
        digest.update(f"{os.path.realpath(shard.path)}\0{shard.size}\0{shard.changed_ns}\0".encode("utf-8", "replace"))
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(root).expanduser() / "megadit" / "tars" / f"{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            return load_index(path)
        except UserError:
            pass  # a damaged cache is made again
    index = build_index([scan(shard) for shard in shards])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_index(index, path)
    except OSError:
        pass  # a home that cannot be written costs the next start another scan
    return index
