"""What a file is, recognized by its first bytes, so that a reader can say what lies there in place of what it expects.

Downloads go wrong in few ways: a pointer in place of the file, a web page, an empty or half-written file, another
format. Readers ask here once they cannot read a file, and so give the remedy that fits. Nothing is unpacked or run.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megadit.errors import UserError

HEAD_BYTES = 4096  # of a file, which show its kind; a tar's mark stands at 257
_AGAIN = "fetch or copy it again"
_UNPACK = "unpack it first"
_CONVERT = "give the weights as .safetensors, or as a torch file of tensors by name"


@dataclass(frozen=True)
class FileKind:
    """id: of the kind, for readers to compare with what they take.  name: with its article, for people.

    remedy: what helps somebody who wanted another kind.
    """

    id: str
    name: str
    remedy: str


_LFS = FileKind("git-lfs", "a git-LFS pointer", "run `git lfs pull` in its repository, or fetch the file itself")
_ANNEX = FileKind("git-annex", "a git-annex pointer", "run `git annex get` on it, or fetch the file itself")
_EMPTY = FileKind("empty", "an empty file", _AGAIN)
_ZEROS = FileKind("zeros", "a file of zeros, whose download or copy did not end", _AGAIN)
_HTML = FileKind(
    "html",
    "a web page (HTML)",
    "fetch the file itself: a page comes where a login is asked for, or a link shows the file",
)
_XML = FileKind(
    "xml", "an XML document, such as the error of a storage server", "look into it, and fetch the file again"
)
_JSON = FileKind("json", "a JSON text", "look into it: it may be a server's error, or another file of the set")
_TEXT = FileKind("text", "a text file", "look into it, and give the file that is meant")
_SAFETENSORS = FileKind("safetensors", "a safetensors file", "name it .safetensors, or choose the format that reads it")
_TORCH = FileKind("torch", "a torch file", "name it .pt, or choose the format that reads it")
_OLD_TORCH = FileKind("old-torch", "a torch file of before torch 1.6", "load it with torch and save it again")
_PICKLE = FileKind("pickle", "a pickle, which could run anything when loaded", _CONVERT)
_NPZ = FileKind("npz", "a NumPy archive (.npz)", "give the file that is meant")
_ZIP = FileKind("zip", "a zip archive", _UNPACK)
_TAR = FileKind("tar", "a tar", _UNPACK)
_WEBP = FileKind("webp", "a WebP picture", "name it .webp")
_HEIF = FileKind("heif", "an AVIF or HEIC picture, or a film", "convert it to PNG or JPEG")
_FOLDER = FileKind("folder", "a folder", "name a file in it")
_SPECIAL = FileKind("special", "no regular file (a pipe, a socket or a device)", "give a file")
# What a file of the kind begins with.
_MARKS: tuple[tuple[bytes, FileKind], ...] = (
    (b"version https://git-lfs", _LFS),
    (b"/annex/objects/", _ANNEX),
    (b"\x1f\x8b", FileKind("gzip", "compressed by gzip", _UNPACK)),
    (b"\x28\xb5\x2f\xfd", FileKind("zstd", "compressed by zstd", _UNPACK)),
    (b"\xfd7zXZ\0", FileKind("xz", "compressed by xz", _UNPACK)),
    (b"\x04\x22\x4d\x18", FileKind("lz4", "compressed by lz4", _UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", FileKind("7z", "a 7-Zip archive", _UNPACK)),
    (b"Rar!\x1a\x07", FileKind("rar", "a RAR archive", _UNPACK)),
    (b"\x89PNG\r\n\x1a\n", FileKind("png", "a PNG picture", "name it .png")),
    (b"\xff\xd8\xff", FileKind("jpeg", "a JPEG picture", "name it .jpg")),
    (b"GIF8", FileKind("gif", "a GIF picture", "name it .gif")),
    (b"II*\0", FileKind("tiff", "a TIFF picture", "name it .tif")),
    (b"MM\0*", FileKind("tiff", "a TIFF picture", "name it .tif")),
    (b"\xff\x0a", FileKind("jxl", "a JPEG XL picture", "convert it to PNG or JPEG")),
    (b"\0\0\0\x0cJXL ", FileKind("jxl", "a JPEG XL picture", "convert it to PNG or JPEG")),
    (b"%PDF-", FileKind("pdf", "a PDF document", "give a picture")),
    (b"%!PS", FileKind("postscript", "a PostScript program", "give a picture")),
    (b"\x93NUMPY", FileKind("npy", "a NumPy array (.npy)", "give the file that is meant")),
    (b"\x89HDF\r\n\x1a\n", FileKind("hdf5", "an HDF5 file, as Keras and TensorFlow write", _CONVERT)),
    (b"GGUF", FileKind("gguf", "a GGUF file of llama.cpp", _CONVERT)),
    (b"SQLite format 3\0", FileKind("sqlite", "an SQLite database", "give the file that is meant")),
    (b"PAR1", FileKind("parquet", "a Parquet table", "write its pictures as files or as tars")),
    (b"ARROW1", FileKind("arrow", "an Arrow table", "write its pictures as files or as tars")),
    (b"\0\x05\x16\x07", FileKind("apple-double", "a macOS side file of another file", "take it out")),
    (b"\x7fELF", FileKind("program", "a program", "give the file that is meant")),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", _OLD_TORCH),  # a pickled number, of protocol 2
)  # fmt: skip
# Marks so short that a text may begin with their letters, with what follows in such a file.
_PATTERNS: tuple[tuple[re.Pattern[bytes], FileKind], ...] = (
    (re.compile(rb"BM.{4}\0{4}.{4}[\x0c-\x7c]\0\0\0", re.DOTALL), FileKind("bmp", "a BMP picture", "name it .bmp")),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), FileKind("bzip2", "compressed by bzip2", _UNPACK)),
    (re.compile(rb"MZ.{3}\0", re.DOTALL), FileKind("program", "a program of Windows", "give the file that is meant")),
)
_PICKLE_MARK = re.compile(rb"\x80[\x02-\x05]")
_HTML_MARK = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06")
_ZIP_END, _ZIP_END_BYTES = b"PK\x05\x06", 22 + 65535  # of the record that ends an archive, with its comment
PICTURES = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "heif")  # ids of what Pillow may read
_NO_TEXT = ("git-lfs", "git-annex", "html")  # ids of texts that stand in place of another file
_WEIGHTS = ("safetensors", "torch")  # ids of weights that can be recognized as cut off
_BY_ENDING = {  # ids that a file of such a name may have
    ".safetensors": ("safetensors",),
    ".bin": ("torch", "old-torch"),
    ".pt": ("torch", "old-torch"),
    ".pth": ("torch", "old-torch"),
    ".json": ("json", "text"),
    ".txt": ("text", "json", "xml"),
    ".model": ("text",),
    ".npz": ("npz", "zip"),
    ".npy": ("npy",),
}
_HEADER_BYTES = 2**27  # of a safetensors file at most; the library takes 100 MB
_PARSED_BYTES = 2**24  # of a header that is looked into
_PNG_END, _JPEG_END = b"IEND\xaeB`\x82", b"\xff\xd9"


def kind_of(head: bytes, size: int | None = None) -> FileKind | None:
    """The kind of a file that begins with ``head``, its first ``HEAD_BYTES`` or all of it; None if it is not known.

    size: bytes of the whole file; None: ``head`` is all of it.
    """
    size = len(head) if size is None else size
    if size == 0:
        return _EMPTY
    for mark, kind in _MARKS:
        if head.startswith(mark):
            return kind
    for pattern, kind in _PATTERNS:
        if pattern.match(head):
            return kind
    if head.startswith(_ZIP_MARKS):
        return _zip_kind(head)
    if head[4:8] == b"ftyp":
        return _HEIF
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _WEBP
    if head[257:262] == b"ustar":
        return _TAR
    if _PICKLE_MARK.match(head):
        return _PICKLE
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _HEADER_BYTES:
        return _SAFETENSORS
    if not any(head):
        return _ZEROS
    return _text_kind(head)


def kind_of_file(path: str | os.PathLike[str]) -> FileKind | None:
    """The kind of the file at ``path``; None if it is not known, is not there or cannot be read. Never waits."""
    try:
        facts = os.stat(path)
        if stat.S_ISDIR(facts.st_mode):
            return _FOLDER
        if not stat.S_ISREG(facts.st_mode):
            return _SPECIAL
        with open(path, "rb") as file:
            return kind_of(file.read(HEAD_BYTES), facts.st_size)
    except OSError:
        return None


def instead(kind: FileKind | None, *expected: str) -> str | None:
    """ "it is a web page (HTML); fetch …", where ``kind`` is none of the ids ``expected``; else None."""
    if kind is None or kind.id in expected:
        return None
    return f"it is {kind.name}; {kind.remedy}"


def file_instead(path: str | os.PathLike[str], *expected: str) -> str | None:
    """``instead`` of the file at ``path``; where it is of an expected kind but was cut off, that."""
    kind = kind_of_file(path)
    other = instead(kind, *expected)
    if other is not None or kind is None:
        return other
    try:
        with open(path, "rb") as file:
            return _cut_off(file, kind)
    except OSError:
        return None


def bytes_instead(data: bytes, *expected: str) -> str | None:
    """``file_instead`` of a file whose bytes are ``data``."""
    kind = kind_of(data[:HEAD_BYTES], len(data))
    other = instead(kind, *expected)
    return other if other is not None or kind is None else _cut_off(io.BytesIO(data), kind)


def other_among(paths: Iterable[Path]) -> str | None:
    """The first of ``paths`` that is something else than its ending says, and what; None if none is.

    Files that are not there, and those of other endings, are passed over.
    """
    for path in paths:
        expected = _BY_ENDING.get(path.suffix)
        other = file_instead(path, *expected) if expected else None
        if other is not None:
            return f"'{path}' is not what its name says: {other}"
    return None


def refuse_broken(key: str, paths: Iterable[Path]) -> None:
    """Raise UserError that names ``key`` for the first of ``paths`` that is a pointer or a web page, or weights that
    are cut off.

    These are looked for before anything is loaded: a tokenizer takes a pointer for a vocabulary of three words, and
    weights are read when the run directory is made already.
    """
    for path in paths:
        kind = kind_of_file(path)
        if kind is not None and kind.id in _NO_TEXT:
            raise UserError(f"{key}: '{path}' is not what its name says: {instead(kind)}")
        short = file_instead(path, kind.id) if kind is not None and kind.id in _WEIGHTS else None
        if short is not None:
            raise UserError(f"{key}: '{path}' cannot be read: {short}")


def text_instead(data: bytes) -> str | None:
    """What stands in place of a text that was meant: a pointer or a web page, which read as text; None otherwise."""
    kind = kind_of(data[:HEAD_BYTES], len(data))
    return None if kind is None or kind.id not in _NO_TEXT else instead(kind)


def _zip_kind(head: bytes) -> FileKind:
    """torch files and NumPy's are zip archives; the name of the first entry tells them apart."""
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith((b"/data.pkl", b"/.format_version", b"/byteorder", b"/version")):
        return _TORCH
    return _NPZ if name.endswith(b".npy") else _ZIP


def _text_kind(head: bytes) -> FileKind | None:
    """The kind of what can be read as text."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _TEXT
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _HTML_MARK.match(body):
        return _HTML
    if body.startswith(b"<?xml"):
        return _XML
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a character that the head's end has cut
            return None
        text = head[: error.start].decode("utf-8")
    if any(ord(letter) < 32 and letter not in "\t\n\r\f\x1b" for letter in text):
        return None
    return _JSON if body[:1] in (b"{", b"[") else _TEXT


def _cut_off(file: BinaryIO, kind: FileKind) -> str | None:
    """That a file of a known kind lacks its end; None if it does not, or if its kind does not show it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_END_BYTES))
    end = file.read(_ZIP_END_BYTES)
    missing = None
    if kind.id == "safetensors":
        missing = _short_safetensors(file, size)
    elif kind.id in ("torch", "npz", "zip") and _ZIP_END not in end:
        missing = "the table at its end is missing"
    elif (kind.id == "png" and _PNG_END not in end) or (kind.id == "jpeg" and _JPEG_END not in end):
        missing = "the mark of a picture's end is missing"
    return None if missing is None else f"it is cut off: {missing}; {_AGAIN}"


def _short_safetensors(file: BinaryIO, size: int) -> str | None:
    """What a safetensors file lacks: of its header, or of the tensors that this lists."""
    file.seek(0)
    header = int.from_bytes(file.read(8), "little")
    if header + 8 > size:
        return f"its header alone has {header:,} bytes, the file {size:,}"
    if header > _PARSED_BYTES:
        return None
    try:
        entries = json.loads(file.read(header)).values()
        ends = [entry["data_offsets"][1] for entry in entries if "data_offsets" in entry]
        needed = 8 + header + max(ends, default=0)
        return f"its tensors need {needed:,} bytes, the file has {size:,}" if needed > size else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # no header of tensors
        return None
