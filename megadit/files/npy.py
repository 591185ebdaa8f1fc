"""``.npy`` files from anywhere: a header is compared with the bytes that are there before an array of its size is made.

numpy's own reader makes the array first, so that a header of a few bytes may ask for any memory. Arrays of objects,
which are pickles, are refused. The format: numpy.lib.format.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import IO, Any

import numpy as np

_READERS: dict[tuple[int, int], Callable[[IO[bytes]], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether it is in Fortran order, dtype) of a file of ``size`` bytes; the stream is left at the values.

    Raises:
        ValueError: the values are more or fewer bytes than the header says, or objects, or its version is another.
            About a damaged header numpy raises this and nearly anything else.
    """
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise ValueError(f"its format has version {version[0]}.{version[1]}, and 1.0 and 2.0 are read")
    shape, fortran_order, dtype = _READERS[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which could run anything when loaded")
    promised, present = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if promised != present:
        raise ValueError(
            f"it holds {present:,} bytes where its header, {dtype} of shape {shape}, promises {promised:,}"
        )
    return shape, fortran_order, dtype


def array_of(data: bytes) -> np.ndarray:
    """The array of a file's bytes, a copy in C order. Raises as ``read_header`` does."""
    stream = io.BytesIO(data)
    shape, fortran_order, dtype = read_header(stream, len(data))
    array: np.ndarray = np.ndarray(shape, dtype, data, stream.tell(), order="F" if fortran_order else "C")
    return np.array(array, order="C")
