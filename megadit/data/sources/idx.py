"""The idx format of MNIST and its kin, plain or gzipped.

Big-endian: two zero bytes, one byte for the element type (8: unsigned byte), one for the number of
dimensions, one 32-bit size per dimension, then the elements in row-major order.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from megadit.errors import UserError
from megadit.files.file_kind import file_instead

_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 2**31  # of the elements; Fashion-MNIST has 47 million
_DEFLATED = 1032  # bytes that one byte of a gzip file can stand for, at most


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file with this many dimensions.

    No more is unpacked than the header promises, and nothing of what the file cannot hold. Raises ``UserError`` that
    names the file when it is not such a file, is cut short or goes on too long.
    """
    header = 4 + 4 * dimensions
    head = _read(path, 0, header)
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if head[:4] != expected:
        other = file_instead(path, "empty") if path.suffix != ".gz" else None
        raise UserError(
            f"data.path: {path} is not an idx file of unsigned bytes in {dimensions} dimensions: it begins with "
            f"{head[:4].hex() or 'nothing'} instead of {expected.hex()}; {other or 'give the original file'}"
        )
    if len(head) < header:
        raise UserError(f"data.path: {path} is cut short in its header; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", head[4:])
    promised = math.prod(shape)
    if promised > min(_MOST_BYTES, _DEFLATED * path.stat().st_size):
        raise UserError(
            f"data.path: {path} has a header {list(shape)} that promises {promised:,} bytes, which is more than it can "
            f"hold, or than the {_MOST_BYTES:,} that are read; fetch the file again"
        )
    content = _read(path, header, promised + 1)
    if len(content) != promised:
        there = len(content) if len(content) < promised else f"more than {promised}"
        raise UserError(
            f"data.path: {path} holds {there} bytes where its header {list(shape)} promises {promised}; fetch the file "
            "again"
        )
    return np.frombuffer(content, dtype=np.uint8).reshape(shape).copy()


def _read(path: Path, start: int, count: int) -> bytes:
    """At most ``count`` bytes from ``start`` on, unpacked where the file is gzipped."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            file.seek(start)
            return file.read(count)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        other = file_instead(path, "gzip")
        told = f"is no gzip file: {other}" if other else f"is a damaged gzip file ({error}); fetch the file again"
        raise UserError(f"data.path: {path} {told}") from None
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} ({error.strerror or error}); check the file") from None
