"""What a folder of tars looks like: names of members, shards and the files beside them; and reading pieces of tars.

A sample is the members of one tar that share everything before the first dot of their file name (WebDataset's rule).
Open files are bounded in number, and safe beside forks, threads and replaced files.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megadit.errors import UserError

MANIFEST = "manifest.json"
INDEX = "index.safetensors"
NULL_TEXT = "null_text.safetensors"
RECIPE = ".recipe.json"  # what a set that is being written will be, so that only the same command goes on with it

IMAGES = ("png", "jpg", "jpeg", "webp")
LATENT, LATENT_MIRRORED = "latent.npy", "latent_mirrored.npy"
TEXT, POOLED = "text.npy", "pooled.npy"
FEATURES, FEATURES_MIRRORED = "features.npy", "features_mirrored.npy"
JSON, LABEL, CAPTION = "json", "cls", "txt"
ARRAYS = (LATENT, LATENT_MIRRORED, TEXT, POOLED, FEATURES, FEATURES_MIRRORED)
KNOWN = (*IMAGES, *ARRAYS, JSON, LABEL, CAPTION)
PICKLED = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "bin", "joblib"})  # what loaders would unpickle

_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}", re.ASCII)
_MOST_SHARDS = 1_000_000  # of a pattern
_MOST_FOLDERS = 100  # that are looked into for tars
_SIDE_FILE = "._"  # how macOS names what it keeps of a file beside it, on disks of other systems
_PACKED = (".tgz", ".tzst", ".txz", *(f".tar.{kind}" for kind in ("gz", "zst", "xz", "bz2", "lz4", "lzma", "zip")))

Progress = Callable[[int, int], None]  # samples done, samples in all


@dataclass(frozen=True)
class Sharding:
    """How tars are cut. prefix: of their names.  max_bytes: None for no limit."""

    prefix: str
    per_shard: int
    max_bytes: int | None = None


def split_member(name: str) -> tuple[str, str]:
    """(key, extension) of a member's name: a/b.latent.npy -> (a/b, latent.npy); no extension: empty."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    key = stem if path.parent == PurePosixPath(".") else f"{path.parent}/{stem}"
    return key, extension.lower()


def shard_name(prefix: str, number: int) -> str:
    """The file name of a shard, as WebDataset's patterns expect it."""
    return f"{prefix}-{number:06d}.tar"


def find_shards(path: str | None) -> tuple[Path, list[Path], bool]:
    """(folder, shards, whole) of ``data.path``: a folder, one tar, or a pattern such as x-{000000..000009}.tar.

    whole: the path is a folder, so that all its tars are meant. Raises UserError where nothing is there.
    """
    if path is None:
        raise UserError(
            "data.path: not given; webdataset needs a folder of tars, or shards like x-{000000..000009}.tar"
        )
    place = Path(path)
    if place.is_dir():
        shards = sorted(shard for shard in place.glob("*.tar") if not shard.name.startswith(_SIDE_FILE))
        if not shards and not (place / MANIFEST).is_file():
            there = "".join(f". {remark}" for remark in overlooked(place))
            raise UserError(f"data.path: {path} has no .tar files; give the folder of the shards{there}")
        return place, shards, True
    names = expand(path)
    missing = [name for name in names if not _is_file(name)]
    if missing:
        remedy = "give a folder, a tar, or a pattern like x-{000000..000009}.tar"
        of = f" ({len(missing)} of {len(names)} are missing)" if len(names) > 1 else ""
        raise UserError(f"data.path: there is no file {missing[0]}{of}; {remedy}")
    return Path(names[0]).parent, [Path(name) for name in names], False


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name too long for any file
        return False


def overlooked(folder: Path) -> list[str]:
    """Sentences about tars in a folder that nobody reads: packed ones, side files, and those of its first sub-folders.

    Raises UserError if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            present = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"data.path: {folder} cannot be listed ({error.strerror or error}); give one that can"
        ) from None
    packed = [
        entry.name
        for entry in present
        if entry.name.lower().endswith(_PACKED) or (entry.name.lower().endswith(".tar") and entry.name[-4:] != ".tar")
    ]
    beside = [entry.name for entry in present if entry.name.startswith(_SIDE_FILE) and entry.name.endswith(".tar")]
    folders = (entry for entry in present if entry.is_dir() and not entry.name.endswith(".tar"))
    looked = itertools.islice(folders, _MOST_FOLDERS)
    below = [entry.name for entry in looked if next(Path(entry.path).glob("*.tar"), None) is not None]
    found = []
    if packed:
        found.append(f"packed tars are not read ({_count(packed)} in {folder}): unpack them to names that end in .tar")
    if beside:
        found.append(f"macOS side files of tars are not read ({_count(beside)} in {folder})")
    if below:
        found.append(
            f"tars in sub-folders are not read ({_count(below)} in {folder}): move them up, or give the folder"
        )
    return found


def _count(names: list[str]) -> str:
    return shown_name(names[0]) + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def expand(pattern: str) -> list[str]:
    """A pattern with {000000..000009} written out, as WebDataset does. Raises UserError for a range that is empty, or
    names more tars than any set has.
    """
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise UserError(f"data.path: {found[0]} in {pattern} counts down; write the lower number first")
    if math.prod(1 + int(b) - int(a) for a, b in _RANGE.findall(pattern)) > _MOST_SHARDS:
        raise UserError(f"data.path: {pattern} names more than {_MOST_SHARDS:,} tars; end it at the last one")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [name for n in range(first, last + 1) for name in expand(f"{head}{n:0{len(found[1])}d}{tail}")]


_OPEN_FILES = 64  # per process; opening one again costs microseconds
_SHOWN = 120  # characters of a name in a sentence


@dataclass(frozen=True)
class ShardFile:
    """A tar as it was when the set was opened: a file that was replaced since is another one."""

    path: str
    size: int
    changed_ns: int

    @staticmethod
    def of(path: str | os.PathLike[str]) -> ShardFile:
        """The file at ``path`` now. Raises OSError, also where it is no regular file, from which a read may wait."""
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return ShardFile(os.fspath(path), facts.st_size, facts.st_mtime_ns)

    @property
    def name(self) -> str:
        """Its file name."""
        return os.path.basename(self.path)

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``. Raises UserError that names the tar where it has become unreadable."""
        try:
            data = os.pread(_opened(self).descriptor, size, offset)
        except OSError as error:
            raise UserError(
                f"data.path: cannot read {self.path} ({error.strerror or error}); put it back, or give another path"
            ) from error
        if len(data) != size:
            raise UserError(f"data.path: {self.path} ends before byte {offset + size}; copy the tar again")
        return data


class _Open:
    """A descriptor that is closed with its last user: dropping it from the cache never closes it under a reader.

    Reads name their offset (pread), so a descriptor that a fork inherited has no position to share.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(file: ShardFile) -> _Open:
    return _Open(file.path)


def shown_name(name: str) -> str:
    """The name of a member in a sentence: one line, what is not printable as an escape, cut where it is long."""
    if len(name) > _SHOWN:
        name = f"{name[: _SHOWN // 2]}…{name[-_SHOWN // 2 :]}"
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(sign: str) -> str:
    if sign.isprintable():
        return sign
    if "\udc80" <= sign <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()
