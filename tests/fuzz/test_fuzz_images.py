"""Pictures in every format that is read: decoded and cut to size, or refused by name, within bounds."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image

from helpers.fuzz.hunt import efforts, hunt, mutated
from megadit.data.image_files import check_header, read_image
from megadit.data.shards.members import read_array, read_picture
from megadit.errors import UserError

WORDS: dict[str, tuple[bytes, ...]] = {
    "png": (
        b"IHDR",
        b"IDAT",
        b"IEND",
        b"PLTE",
        b"tRNS",
        b"iCCP",
        b"zTXt",
        b"acTL",
        b"fcTL",
        b"eXIf",
        b"\0\0\x4e\x20",
        b"\x7f\xff\xff\xff",
    ),
    "jpeg": (
        b"\xff\xd8",
        b"\xff\xd9",
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xda",
        b"\xff\xe1\0\x08Exif\0\0",
        b"\xff\xff",
        b"\xff\xdd\0\4\0\1",
    ),
    "gif": (b"GIF87a", b"GIF89a", b"\x21\xf9\4", b"\x2c", b"\x3b", b"\x21\xff\x0bNETSCAPE2.0"),
    "webp": (b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF"),
    "bmp": (b"BM", b"\x28\0\0\0", b"\x0c\0\0\0", b"\1\0\0\0", b"\3\0\0\0"),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"\3\1\3\0", b"\x11\1\4\0", b"\x17\1\4\0", b"\5\0", b"\x07\0", b"\xb2\x80"),
    "ppm": (b"P6", b"P5", b"P3", b"P1", b"P7", b"Pf", b"Py", b" 65535 ", b"#", b"99999 99999"),
}


def pictures(kind: str) -> list[bytes]:
    """Small pictures of a format in each of the modes that people store."""
    files = []
    gradient = Image.linear_gradient("L").resize((12, 9))
    for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "CMYK", "LA"):
        for options in _options(kind):
            buffer = io.BytesIO()
            try:
                gradient.convert(mode).save(buffer, kind, **options)
            except (OSError, ValueError, KeyError):  # a mode that the format has not
                continue
            files.append(buffer.getvalue())
    assert files
    return files


def _options(kind: str) -> list[dict[str, Any]]:
    if kind == "tiff":
        return [{"compression": name} for name in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits")]
    if kind == "webp":
        return [{"lossless": True}, {"quality": 50}]
    return [{"progressive": True}, {}] if kind == "jpeg" else [{}]


@efforts
@pytest.mark.parametrize("kind", sorted(WORDS))
def test_pictures(effort: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"

    def read(drawn: tuple[bytes, str]) -> None:
        data, crop = drawn
        file.write_bytes(data)
        try:
            image = read_image(file, 8, crop)  # type: ignore[arg-type]
        finally:
            with contextlib.suppress(UserError):
                check_header(file)
        assert image.shape == (3, 8, 8)
        assert read_picture(data, 1, 8, "a.png in x.tar").shape == (1, 8, 8)

    hunt(effort, st.tuples(mutated(pictures(kind), WORDS[kind]), st.sampled_from(["adm", "center"])), read, quick=13)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@efforts
def test_sizes_that_a_header_only_claims(effort: str, tmp_path: Path) -> None:
    """Well-formed PNG of any width and height, depth and colour, whose pixels may be there or not."""
    file = tmp_path / "a.png"
    sides = st.sampled_from([0, 1, 2, 7, 8, 9, 255, 4000, 20_000, 65_535, 10**6, 2**31 - 1, 2**32 - 1])
    forms = st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([0, 2, 3, 4, 6]), st.sampled_from([0, 1]))

    def read(drawn: tuple[int, int, tuple[int, int, int], bool]) -> None:
        width, height, (depth, colour, interlace), whole = drawn
        channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        size = (1 + -(-width * depth * channels // 8)) * height
        pixels = zlib.compress(bytes(size) if whole and size < 2**24 else b"\0", 1)
        head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
        parts = [chunk(b"IHDR", head), chunk(b"PLTE", bytes(6)), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        assert read_image(file, 8, "adm").shape == (3, 8, 8)

    hunt(effort, st.tuples(sides, sides, forms, st.booleans()), read, quick=16, long=600)


@efforts
def test_arrays(effort: str) -> None:
    """.npy members."""
    import numpy as np

    arrays = [
        np.zeros((2, 3), np.float16),
        np.zeros((4, 2, 2), np.float32),
        np.zeros((), np.int64),
        np.zeros((2, 2), order="F"),
    ]
    files = []
    for array in arrays:
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.append(buffer.getvalue())
    words = (
        b"'descr': '|O'",
        b"'<f8'",
        b"'<f4'",
        b"'|V99999999'",
        b"(99999999999, )",
        b"(-1,)",
        b"True",
        b"{" * 900,
        b"-" * 900,
        b"__import__('os')",
        b"\x93NUMPY\3\0",
        b"'<M8'",
    )

    def read(data: bytes) -> None:
        read_array(data, "a.latent.npy in x.tar")

    hunt(effort, mutated(files, words), read, quick=27)
