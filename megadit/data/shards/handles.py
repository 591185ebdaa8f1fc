"""Reading pieces of many tars: a bounded number of open files, safe beside forks, threads and replaced files."""

from __future__ import annotations

import errno
import functools
import os
import stat
from dataclasses import dataclass

from megadit.errors import UserError

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
