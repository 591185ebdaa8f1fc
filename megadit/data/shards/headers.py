"""The headers of a tar, one after another, with no block left out: whatever lies between the first and the end is read.

Python's tarfile and WebDataset end without a word at a damaged header and at the first zero block, behind which tars
that were joined with ``cat`` go on. Here the end is a zero block behind which nothing but zeros follow.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megadit.data.shards.shard_files import ShardFile, shown_name
from megadit.errors import UserError, why_unreadable
from megadit.files.file_kind import file_instead

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # a tar is written in records of 20 blocks
_MOST_EXTENDED = 2**20  # bytes of an extended header; names and attributes of files fit many times
_CHUNK = 2**20
_AGAIN = "copy the tar again, or write it again"
_EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE}
_LONG = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_FOLDERS = {tarfile.DIRTYPE, b"D", b"V"}  # b"D": with a list of names, of incremental tars; b"V": the tar's own label
_LINKS = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link"}
_DEVICES = {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe"}
_RECORD_HEAD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_GNU_MAGIC = b"ustar  \0"


@dataclass(frozen=True)
class Member:
    """A file of a tar: ``size`` bytes from ``offset``. link: what it is in place of a regular file, in words."""

    name: str
    offset: int
    size: int
    link: str = ""


class TarHeaders:
    """The members of a tar in their order; folders are passed over.

    Iterating raises UserError, naming the tar, the byte and the last member before it, where it is no tar, damaged,
    cut off, followed by anything but zeros, or holds what no offset and size describe (sparse files, parts of a
    multi-volume tar). zeros: behind the last member, once all were read, where tar would not pad with so many.
    """

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        self.zeros = 0
        self._end, self._last = 0, ""

    def __iter__(self) -> Iterator[Member]:
        path = self.shard.path
        try:
            with open(path, "rb") as file:
                at = 0
                while (found := self._next(file, at)) is not None:
                    member, at = found
                    if member is not None:
                        yield member
                self._check_end(file)
        except OSError as error:
            raise UserError(f"data.path: cannot read {path} {why_unreadable(error, _AGAIN)}") from None

    def _next(self, file: BinaryIO, at: int) -> tuple[Member | None, int] | None:
        """The member whose headers begin at ``at`` (None: a folder) and where the next begins; None at the end."""
        extended: dict[str, str] = {}
        begin = at
        while True:
            file.seek(at)
            info = self._header(file.read(BLOCK), at)
            if info is None:
                if extended or at != begin:
                    raise self._damaged(at, "an extended header describes no member")
                self._end = at
                return None
            at += BLOCK
            if info.type in _EXTENDED or info.type in _LONG:
                data = self._data(file, info, at)
                at += _padded(info.size)
                self._take(extended, info, data, at)
            else:
                return self._member(info, extended, at)

    def _header(self, block: bytes, at: int) -> tarfile.TarInfo | None:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if len(block) == BLOCK and not any(block):
                return None
            if len(block) < BLOCK and at:
                raise UserError(
                    f"data.path: {self.shard.path} is torn: it ends at byte {self.shard.size}{self._behind()}, without "
                    f"the mark of a tar's end; {_AGAIN}"
                ) from None
            if at:
                raise self._damaged(at, f"there is no header of a member: {error}") from None
            told = file_instead(self.shard.path, "tar") or f"it does not begin with a header: {error}; {_AGAIN}"
            raise UserError(f"data.path: {self.shard.path} is not a whole, uncompressed tar: {told}") from None
        if block[257:265] == _GNU_MAGIC:  # other things lie where others keep the front of a long name
            info.name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return info

    def _data(self, file: BinaryIO, info: tarfile.TarInfo, at: int) -> bytes:
        if not 0 <= info.size <= _MOST_EXTENDED:
            raise self._damaged(at - BLOCK, f"an extended header of {info.size} bytes is no tar's")
        data = file.read(info.size)
        if len(data) < info.size:
            raise self._damaged(at, "the tar ends within an extended header")
        return data

    def _take(self, extended: dict[str, str], info: tarfile.TarInfo, data: bytes, at: int) -> None:
        """Add what an extended header says of the member that follows."""
        if info.type in _LONG:
            name, _, rest = data.partition(b"\0")
            if not name or rest.strip(b"\0"):
                raise self._damaged(at, "a long name is damaged")
            key = "path" if info.type == tarfile.GNUTYPE_LONGNAME else "linkpath"
            extended[key] = name.decode("utf-8", "surrogateescape")
            return
        records = _records(data)
        if records is None:
            raise self._damaged(at, "an extended header is damaged")
        if info.type != tarfile.XGLTYPE:
            extended.update(records)
        elif bad := next((key for key in records if key in ("path", "size") or _sparse(key)), None):
            raise self._damaged(at, f"a header gives one {bad} to all members")

    def _member(self, info: tarfile.TarInfo, extended: dict[str, str], at: int) -> tuple[Member | None, int]:
        name = extended.get("path") or info.name
        size = info.size
        if text := extended.get("size"):
            size = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        shown = shown_name(name)
        if "\0" in name or not 0 <= size < 2**63:
            what = "its name holds a zero byte" if "\0" in name else f"it cannot have {size} bytes"
            raise self._damaged(at - BLOCK, f"the header of {shown} is none: {what}")
        if info.type == tarfile.GNUTYPE_SPARSE or any(map(_sparse, extended)):
            shown = shown_name(extended.get("GNU.sparse.name", name))
            raise UserError(
                f"data.path: {shown} in {self.shard.path} is stored as a sparse file, whose bytes do not lie together; "
                "write the tar again without --sparse"
            )
        if info.type in (b"M", b"N"):
            raise UserError(
                f"data.path: {self.shard.path} is a part of a multi-volume tar, which goes on with {shown}; unpack "
                "all its parts (tar --multi-volume -x) and write them as whole tars"
            )
        link = ""
        if info.type in _LINKS:
            link = f"{_LINKS[info.type]} to {shown_name(extended.get('linkpath') or info.linkname)}"
        elif info.type not in _REGULAR and info.type not in _FOLDERS:
            link = _DEVICES.get(info.type, f"of the unknown type {info.type!r}"[:40])
        # Links, devices and folders have no bytes, whatever their headers say.
        end = at if info.type in _LINKS or info.type in _DEVICES or info.type == tarfile.DIRTYPE else at + size
        if end > self.shard.size:
            raise UserError(
                f"data.path: {self.shard.path} is torn: it ends at byte {self.shard.size}, within {shown}, which goes "
                f"on to byte {end}{self._behind('; the last whole member is')}; {_AGAIN}"
            )
        self._last = name
        return None if info.type in _FOLDERS else Member(name, at, end - at, link), at + _padded(end - at)

    def _check_end(self, file: BinaryIO) -> None:
        """Hold what follows the first zero block against zeros."""
        end, size = self._end, self.shard.size
        at = _first_other(file, end, size)
        if at is not None:
            block = at // BLOCK * BLOCK
            file.seek(block)
            what = f"{self.shard.path} goes on after the mark of a tar's end at byte {end}{self._behind()}"
            if _is_header(file.read(BLOCK)):
                raise UserError(
                    f"data.path: {what}: other members begin at byte {block}, as in tars that were joined with cat. "
                    f"Join tars with tar --concatenate, or give them one by one: head -c {block} and "
                    f"tail -c +{block + 1} part this one; if it should be one tar, copy it again"
                )
            raise UserError(
                f"data.path: {what}: byte {at} is not zero. Zeros lie over a part of it, or something was written "
                f"behind it; {_AGAIN}"
            )
        # One record more comes from tar --concatenate; a part of a block from a copy that was cut off, or from others.
        if size % BLOCK or size > _padded(end + 2 * BLOCK, RECORD) + RECORD:
            if not self._last:
                raise UserError(
                    f"data.path: {self.shard.path} holds {size} zero bytes and nothing else: its copy or download did "
                    f"not end; {_AGAIN}"
                )
            self.zeros = size - end

    def _damaged(self, at: int, what: str) -> UserError:
        where = f"at byte {at}{self._behind()}"
        return UserError(f"data.path: {self.shard.path} is damaged {where}: {what}; {_AGAIN}")

    def _behind(self, words: str = ", after") -> str:
        return f"{words} {shown_name(self._last)}" if self._last else ""


def _padded(size: int, unit: int = BLOCK) -> int:
    return -(-size // unit) * unit


def _records(data: bytes) -> dict[str, str] | None:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; None if it holds anything else."""
    found: dict[str, str] = {}
    at = 0
    while head := _RECORD_HEAD.match(data, at):
        end = at + int(head[1])
        if not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        key = head[2].decode("utf-8", "surrogateescape")
        found[key] = data[head.end() : end - 1].decode("utf-8", "surrogateescape")
        at = end
    return None if at < len(data) else found


def _sparse(key: str) -> bool:
    return key.startswith("GNU.sparse.")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _first_other(file: BinaryIO, begin: int, end: int) -> int | None:
    """The first byte from ``begin`` to ``end`` that is not zero."""
    descriptor, at = file.fileno(), begin
    while (at := _past_holes(descriptor, at, end)) < end:
        chunk = os.pread(descriptor, min(_CHUNK, end - at), at)
        rest = chunk.lstrip(b"\0")
        if rest:
            return at + len(chunk) - len(rest)
        at += len(chunk) or end  # shorter than it was
    return None


def _past_holes(descriptor: int, at: int, end: int) -> int:
    """Where the file system has bytes again: a preallocated file may be zeros for terabytes, which none are read of."""
    try:
        return os.lseek(descriptor, at, os.SEEK_DATA) if at < end else end
    except OSError as error:  # ENXIO: no more; EINVAL: a file system that cannot tell
        return end if error.errno == errno.ENXIO else at
