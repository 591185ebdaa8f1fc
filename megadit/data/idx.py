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

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an idx file with this many dimensions.

    Raises ``UserError`` that names the file when it is not such a file, is cut short or goes on too long.
    """
    content = _content(path)
    header = 4 + 4 * dimensions
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != expected:
        raise UserError(
            f"data.path: {path} is not an idx file of unsigned bytes in {dimensions} dimensions: it begins with "
            f"{content[:4].hex() or 'nothing'} instead of {expected.hex()}; give the original file"
        )
    if len(content) < header:
        raise UserError(f"data.path: {path} is cut short in its header; fetch the file again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"data.path: {path} holds {len(content) - header} bytes where its header {list(shape)} "
            f"promises {math.prod(shape)}; fetch the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def _content(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path, "rb") as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.path: {path} is a damaged gzip file ({error}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} ({error.strerror or error}); check the file") from None
