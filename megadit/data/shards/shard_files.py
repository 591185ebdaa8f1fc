"""Tars on disk: which ones ``data.path`` means, and reading spans of bytes of them.

Open files are bounded in number, and safe with forks, threads and replaced files.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from megadit.data.shards.naming import MANIFEST, shown_name
from megadit.errors import UserError

_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}", re.ASCII)
_MOST_SHARDS = 1_000_000  # of a pattern
_MOST_FOLDERS = 100  # that are looked into for tars
_SIDE_FILE = "._"  # how macOS names what it keeps of a file beside it, on disks of other systems
_PACKED = (".tgz", ".tzst", ".txz", *(f".tar.{kind}" for kind in ("gz", "zst", "xz", "bz2", "lz4", "lzma", "zip")))


def find_shards(path: str | None) -> tuple[Path, list[Path], bool]:
    """(folder, shards, is_folder) of ``data.path``: a folder, one tar, or a pattern such as x-{000000..000009}.tar.

    is_folder: the path is a folder, all of whose tars are read. Raises UserError where nothing is there.
    """
    if path is None:
        raise UserError(
            "data.path: not given; webdataset needs a folder of tars, or shards like x-{000000..000009}.tar"
        )
    folder = Path(path)
    if folder.is_dir():
        shards = sorted(shard for shard in folder.glob("*.tar") if not shard.name.startswith(_SIDE_FILE))
        if not shards and not (folder / MANIFEST).is_file():
            remarks = "".join(f". {remark}" for remark in unread_tars(folder))
            raise UserError(f"data.path: {path} has no .tar files; give the folder of the shards{remarks}")
        return folder, shards, True
    names = expand(path)
    missing = [name for name in names if not _is_file(name)]
    if missing:
        remedy = "give a folder, a tar, or a pattern like x-{000000..000009}.tar"
        count = f" ({len(missing)} of {len(names)} are missing)" if len(names) > 1 else ""
        raise UserError(f"data.path: there is no file {missing[0]}{count}; {remedy}")
    return Path(names[0]).parent, [Path(name) for name in names], False


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # a name too long for any file
        return False


def unread_tars(folder: Path) -> list[str]:
    """A sentence for each kind of tars of a folder that are not read: compressed, side files, in its first sub-folders.

    Raises UserError if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            present = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"data.path: {folder} cannot be listed ({error.strerror or error}); give one that can"
        ) from None
    names = [entry.name for entry in present]
    packed = [n for n in names if n.lower().endswith((*_PACKED, ".tar")) and not n.endswith(".tar")]  # .TAR is none
    side_files = [n for n in names if n.startswith(_SIDE_FILE) and n.endswith(".tar")]
    folders = (entry for entry in present if entry.is_dir() and not entry.name.endswith(".tar"))
    first_folders = itertools.islice(folders, _MOST_FOLDERS)
    with_tars = [entry.name for entry in first_folders if next(Path(entry.path).glob("*.tar"), None) is not None]
    sentences = (
        (packed, "packed tars are not read ({}): unpack them to names that end in .tar"),
        (side_files, "macOS side files of tars are not read ({})"),
        (with_tars, "tars in sub-folders are not read ({}): move them up, or give the folder"),
    )
    return [sentence.format(f"{_count(tars)} in {folder}") for tars, sentence in sentences if tars]


def _count(names: list[str]) -> str:
    return shown_name(names[0]) + (f" and {len(names) - 1:,} more" if len(names) > 1 else "")


def expand(pattern: str) -> list[str]:
    """A pattern with {000000..000009} written out, as WebDataset does. Raises UserError for a range that is empty, or
    names more tars than any set has.
    """
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise UserError(f"data.path: {match[0]} in {pattern} counts down; write the lower number first")
    if math.prod(1 + int(b) - int(a) for a, b in _RANGE.findall(pattern)) > _MOST_SHARDS:
        raise UserError(f"data.path: {pattern} names more than {_MOST_SHARDS:,} tars; end it at the last one")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for n in range(first, last + 1) for name in expand(f"{head}{n:0{len(match[1])}d}{tail}")]


_OPEN_FILES = 64  # per process; opening one again costs microseconds


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
            data = os.pread(_descriptor(self).number, size, offset)
        except OSError as error:
            raise UserError(
                f"data.path: cannot read {self.path} ({error.strerror or error}); put it back, or give another path"
            ) from error
        if len(data) != size:
            raise UserError(f"data.path: {self.path} ends before byte {offset + size}; copy the tar again")
        return data


class _Descriptor:
    """A file descriptor, closed with its last user: dropping it from the cache never closes it under a reader.

    Reads name their offset (pread), so a descriptor that a fork inherited has no position to share.
    """

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=_OPEN_FILES)
def _descriptor(file: ShardFile) -> _Descriptor:
    return _Descriptor(file.path)
