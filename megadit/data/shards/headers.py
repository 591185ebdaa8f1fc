"""The headers of a tar: where the bytes of every member lie. Every block up to the end of the archive is checked.

A tar is a sequence of blocks of 512 bytes. A header takes one block; data are padded with zeros to whole blocks:

      0             512           1024          1536            2560            3072            3584 ...
      +-------------+-------------+-------------+---------------+---------------+---------------+-----------+
      | header "x"  | pax records | header of A | data of A     | header of B   | data of B     | end: 0000 |
      +-------------+-------------+-------------+---------------+---------------+---------------+-----------+
                                                ^ offset of A = 1536, its size = 700: the next header is at
                                                  1536 + 700 rounded up to a multiple of 512 = 2560

    header "x"     an extended header, whose data are records "LENGTH KEY=VALUE\\n" of the next member ("g": of all that
                   follow), or a long name of GNU tar ("L", "K"). Its path and size replace those of the next header,
                   which has room for names of 100 bytes and sizes up to 8 GiB.
    offset, size   the span of a member, which the sample index stores: one pread gives the data.
    end            two zero blocks, then zeros up to a multiple of a record of 20 blocks.

Python's tarfile and WebDataset stop silently at a damaged header, and at the first zero block, after which tars that
were joined with ``cat`` go on. Here the end is a zero block that only zeros follow.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megadit.data.shards.naming import shown_name
from megadit.data.shards.shard_files import ShardFile
from megadit.errors import UserError, why_unreadable
from megadit.files.file_kind import file_instead

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # a tar is written in records of 20 blocks
_MOST_PAX = 2**20  # bytes of an extended header; names and attributes of files fit many times
_CHUNK = 2**20
_REMEDY = "copy the tar again, or write it again"
_PAX = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE}
_GNU_LONG = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}
_FOLDERS = {tarfile.DIRTYPE, b"D", b"V"}  # b"D": with a list of names, of incremental tars; b"V": the tar's own label
_LINKS = {tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link"}
_DEVICES = {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe"}
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")
_GNU_MAGIC = b"ustar  \0"


@dataclass(frozen=True)
class Member:
    """A file of a tar: its data are ``size`` bytes from ``offset``. link: in words, if it is no regular file."""

    name: str
    offset: int
    size: int
    link: str = ""


class TarHeaders:
    """The members of a tar in their order, without folders.

    Iterating raises UserError, naming the tar, the byte and the last member before it, where it is no tar, damaged,
    cut off, followed by anything but zeros, or holds what no offset and size describe (sparse files, parts of a
    multi-volume tar). zeros: bytes after the last member, once all were read, where tar would not pad with so many.
    """

    def __init__(self, shard: ShardFile) -> None:
        self.shard = shard
        self.zeros = 0
        self._end, self._last = 0, ""  # byte of the first zero block, name of the last member

    def __iter__(self) -> Iterator[Member]:
        path = self.shard.path
        try:
            with open(path, "rb") as file:
                offset = 0
                while (read := self._next_member(file, offset)) is not None:
                    member, offset = read
                    if member is not None:
                        yield member
                self._check_end(file)
        except OSError as error:
            raise UserError(f"data.path: cannot read {path} {why_unreadable(error, _REMEDY)}") from None

    def _next_member(self, file: BinaryIO, begin: int) -> tuple[Member | None, int] | None:
        """The member whose headers begin at ``begin`` (None: a folder) and where the next begins; None at the end."""
        extended: dict[str, str] = {}
        offset = begin
        while True:
            file.seek(offset)
            header = self._header(file.read(BLOCK), offset)
            if header is None:
                if extended or offset != begin:
                    raise self._damaged(offset, "an extended header describes no member")
                self._end = offset
                return None
            offset += BLOCK
            if header.type not in _PAX | _GNU_LONG:
                return self._member(header, extended, offset)
            data = self._extended_data(file, header, offset)
            offset += _padded(header.size)
            extended |= self._extended_fields(header, data, offset)

    def _header(self, block: bytes, offset: int) -> tarfile.TarInfo | None:
        """The header in a block; None for a zero block."""
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if len(block) == BLOCK and not any(block):
                return None
            if len(block) < BLOCK and offset:
                raise UserError(
                    f"data.path: {self.shard.path} is torn: it ends at byte {self.shard.size}{self._after_last()}, "
                    f"without the mark of a tar's end; {_REMEDY}"
                ) from None
            if offset:
                raise self._damaged(offset, f"there is no header of a member: {error}") from None
            reason = file_instead(self.shard.path, "tar") or f"it does not begin with a header: {error}; {_REMEDY}"
            raise UserError(f"data.path: {self.shard.path} is not a whole, uncompressed tar: {reason}") from None
        if block[257:265] == _GNU_MAGIC:  # GNU tar has other fields where POSIX has the front of a long name
            header.name = _text(block[:100].partition(b"\0")[0])
        return header

    def _extended_data(self, file: BinaryIO, header: tarfile.TarInfo, offset: int) -> bytes:
        if not 0 <= header.size <= _MOST_PAX:
            raise self._damaged(offset - BLOCK, f"an extended header of {header.size} bytes is no tar's")
        data = file.read(header.size)
        if len(data) < header.size:
            raise self._damaged(offset, "the tar ends within an extended header")
        return data

    def _extended_fields(self, header: tarfile.TarInfo, data: bytes, offset: int) -> dict[str, str]:
        """What an extended header says of the member that follows: path, linkpath, size, ..."""
        if header.type in _GNU_LONG:
            name, _, rest = data.partition(b"\0")
            if not name or rest.strip(b"\0"):
                raise self._damaged(offset, "a long name is damaged")
            return {"path" if header.type == tarfile.GNUTYPE_LONGNAME else "linkpath": _text(name)}
        records = _pax_records(data)
        if records is None:
            raise self._damaged(offset, "an extended header is damaged")
        if header.type != tarfile.XGLTYPE:
            return records
        if shared := next((key for key in records if key in ("path", "size") or _is_sparse(key)), None):
            raise self._damaged(offset, f"a header gives one {shared} to all members")
        return {}

    def _member(self, header: tarfile.TarInfo, extended: dict[str, str], offset: int) -> tuple[Member | None, int]:
        """The member whose data begin at ``offset`` (None: a folder), and where the next header begins."""
        name = extended.get("path") or header.name
        size = header.size
        if text := extended.get("size"):
            size = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        shown = shown_name(name)
        if "\0" in name or not 0 <= size < 2**63:
            problem = "its name holds a zero byte" if "\0" in name else f"it cannot have {size} bytes"
            raise self._damaged(offset - BLOCK, f"the header of {shown} is none: {problem}")
        if header.type == tarfile.GNUTYPE_SPARSE or any(map(_is_sparse, extended)):
            shown = shown_name(extended.get("GNU.sparse.name", name))
            raise UserError(
                f"data.path: {shown} in {self.shard.path} is stored as a sparse file, whose bytes do not lie together; "
                "write the tar again without --sparse"
            )
        if header.type in (b"M", b"N"):
            raise UserError(
                f"data.path: {self.shard.path} is a part of a multi-volume tar, which goes on with {shown}; unpack "
                "all its parts (tar --multi-volume -x) and write them as whole tars"
            )
        link = ""
        if header.type in _LINKS:
            link = f"{_LINKS[header.type]} to {shown_name(extended.get('linkpath') or header.linkname)}"
        elif header.type not in _REGULAR | _FOLDERS:
            link = _DEVICES.get(header.type, f"of the unknown type {header.type!r}"[:40])
        if header.type in _LINKS or header.type in _DEVICES or header.type == tarfile.DIRTYPE:
            size = 0  # whatever their headers say
        end = offset + size
        if end > self.shard.size:
            raise UserError(
                f"data.path: {self.shard.path} is torn: it ends at byte {self.shard.size}, within {shown}, which goes "
                f"on to byte {end}{self._after_last('; the last whole member is')}; {_REMEDY}"
            )
        self._last = name
        return None if header.type in _FOLDERS else Member(name, offset, size, link), offset + _padded(size)

    def _check_end(self, file: BinaryIO) -> None:
        """Raise UserError where anything but zeros follows the first zero block."""
        end, size = self._end, self.shard.size
        offset = _first_nonzero(file, end, size)
        if offset is not None:
            block = offset // BLOCK * BLOCK
            file.seek(block)
            problem = f"{self.shard.path} goes on after the mark of a tar's end at byte {end}{self._after_last()}"
            if _is_header(file.read(BLOCK)):
                raise UserError(
                    f"data.path: {problem}: other members begin at byte {block}, as in tars that were joined with cat. "
                    f"Join tars with tar --concatenate, or give them one by one: head -c {block} and "
                    f"tail -c +{block + 1} part this one; if it should be one tar, copy it again"
                )
            raise UserError(
                f"data.path: {problem}: byte {offset} is not zero. Zeros lie over a part of it, or something was "
                f"written behind it; {_REMEDY}"
            )
        # tar --concatenate adds one record; a part of a block comes from a copy that was cut off, or other programs
        if size % BLOCK or size > _padded(end + 2 * BLOCK, RECORD) + RECORD:
            if not self._last:
                raise UserError(
                    f"data.path: {self.shard.path} holds {size} zero bytes and nothing else: its copy or download did "
                    f"not end; {_REMEDY}"
                )
            self.zeros = size - end

    def _damaged(self, offset: int, problem: str) -> UserError:
        position = f"at byte {offset}{self._after_last()}"
        return UserError(f"data.path: {self.shard.path} is damaged {position}: {problem}; {_REMEDY}")

    def _after_last(self, words: str = ", after") -> str:
        return f"{words} {shown_name(self._last)}" if self._last else ""


def _padded(size: int, unit: int = BLOCK) -> int:
    """``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> dict[str, str] | None:
    """The records "LENGTH KEY=VALUE\\n" of a pax header; None if it holds anything else."""
    records: dict[str, str] = {}
    begin = 0
    while head := _PAX_RECORD.match(data, begin):
        end = begin + int(head[1])
        if not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            return None
        records[_text(head[2])] = _text(data[head.end() : end - 1])
        begin = end
    return None if begin < len(data) else records


def _is_sparse(key: str) -> bool:
    return key.startswith("GNU.sparse.")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _first_nonzero(file: BinaryIO, begin: int, end: int) -> int | None:
    """The first byte from ``begin`` to ``end`` that is not zero."""
    descriptor, offset = file.fileno(), begin
    while (offset := _skip_hole(descriptor, offset, end)) < end:
        chunk = os.pread(descriptor, min(_CHUNK, end - offset), offset)
        nonzero = chunk.lstrip(b"\0")
        if nonzero:
            return offset + len(chunk) - len(nonzero)
        offset += len(chunk) or end  # the file has become shorter
    return None


def _skip_hole(descriptor: int, offset: int, end: int) -> int:
    """The next offset with data on disk: holes of a preallocated file, up to terabytes of zeros, are not read."""
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) if offset < end else end
    except OSError as error:  # ENXIO: no more data; EINVAL: the file system does not support it
        return end if error.errno == errno.ENXIO else offset
