"""``.npy`` arrays: what their header promises is held against what is there, before anything of its size is made."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest

from megadit.data.shards.members import read_array
from megadit.errors import UserError
from megadit.files.npy import array_of


def npy(shape: str, kind: str = "<f4", data: bytes = b"abcd", version: bytes = b"\1\0") -> bytes:
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + data


def saved(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.zeros((0, 5), np.float16), np.array(3, np.float32), np.arange(4, dtype=np.int64)],
)
def test_what_numpy_wrote_is_read(array: np.ndarray) -> None:
    np.testing.assert_array_equal(array_of(saved(array)), array)
    np.testing.assert_array_equal(array_of(saved(np.asfortranarray(array))), array)
    assert array_of(saved(array)).flags.writeable


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            npy("(1000000000,)"),
            r"holds 4 bytes where its header, float32 of shape \(1000000000,\), promises 4,000,000,000",
        ),
        (npy("(100000, 100000, 100000)"), "promises 4,000,000,000,000,000"),
        (npy("(1" + "0" * 40 + ",)"), ""),
        (npy("(-1,)"), "promises -4"),
        (npy("(1000000000, 0)"), "promises 0"),
        (npy("(1,)", data=b"abcdefgh"), "holds 8 bytes where .* promises 4"),
        (npy("(2,)"), "holds 4 bytes where .* promises 8"),
        (npy("(1,)", "|O"), "pickled objects, which could run anything"),
        (npy("(1,)", ">f4"), "byte order"),
        (npy("(1,)", "U1"), ""),
        (npy("(1.0,)"), "shape is not valid"),
        (npy("(10**9,)"), ""),
        (npy("(" * 3000), ""),
        (npy("(1,)", version=b"\x03\0"), "version 3.0"),
        (npy("(1,)", version=b"\x09\x09"), "version 9.9"),
        (b"\x93NUMPY", ""),
        (b"", "empty file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_takes_no_memory(data: bytes, sentence: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=f"^data.path: k.latent.npy in a.tar is no array.*{sentence}") as caught:
            read_array(data, "k.latent.npy in a.tar")
        assert tracemalloc.get_traced_memory()[1] < 2**22  # numpy traces its arrays
    finally:
        tracemalloc.stop()
    assert str(caught.value).endswith("write the shard again") and "\n" not in str(caught.value)
