"""Image files from anywhere: what is not taken is refused by its header, and nothing but images is opened."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from megadit.config import DataConfig
from megadit.data import image_files
from megadit.data.image_files import check_header, read_image
from megadit.data.shards.members import read_picture
from megadit.data.sources.image_folder import load as load_folder
from megadit.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, more: bytes = b"", rows: bytes = b"") -> bytes:
    """A PNG that says it has these sides, whatever its rows are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    )


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat(mode: str, side: int = 8) -> Image.Image:
    return Image.new(mode, (side, side))


ROWS = (b"\0" + bytes(24)) * 8  # of an 8 x 8 picture
REFUSED = {
    "a line": (png(20000, 1), r"it is 20000 x 1 pixels, more than 32 times as long as wide.*; cut it, or take it out"),
    "a column": (png(1, 20000), r"it is 1 x 20000 pixels.*; cut it, or take it out of the set"),
    "just too long": (png(331, 10), "it is 331 x 10 pixels"),
    "10 gigapixels": (png(100000, 100000), "it has 10,000,000,000 pixels, and pictures of more than .*; scale it down"),
    "900 megapixels": (png(30000, 30000), "it has 900,000,000 pixels"),
    "any number": (png(2**31 - 1, 2**31 - 1), "scale it down, or take it out of the set"),
    "no width": (png(0, 5), "its format is not known"),
    "16 bits": (saved(Image.fromarray(np.zeros((8, 8), np.uint16)), "PNG"), "8 bits per channel are needed"),
    "float": (saved(flat("F"), "TIFF"), "8 bits per channel are needed"),
    "a text bomb": (
        png(8, 8, more=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000))), rows=ROWS),
        "too large when unpacked.*; save it again without texts and profile",
    ),
    "a profile bomb": (
        png(8, 8, more=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000))), rows=ROWS),
        "too large when unpacked",
    ),
    "an unfinished PPM": (b"P6 3000 3000 255\n" + bytes(10), "truncated"),
    "a BMP without rows": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 3000, 3000, 1, 24, 0, 0, 0, 0, 0, 0),
        "truncated",
    ),
    "a PDF": (b"%PDF-1.4\n1 0 obj\n", "its format is not known.: it is a PDF document"),
    "HEIC": (
        b"\0\0\0\x18ftypheic" + bytes(100),
        "not known.: it is an AVIF or HEIC picture.*convert it to PNG or JPEG",
    ),
    "FITS": (b"SIMPLE  =                    T".ljust(80) + bytes(2800), "its format is not known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_folders_and_tars(tmp_path: Path, name: str) -> None:
    data, sentence = REFUSED[name]
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(UserError, match=f"^data.path: cannot decode the image .*x.png .*{sentence}"):
        read_image(tmp_path / "x.png", 8)
    for channels in (1, 3):
        with pytest.raises(UserError, match=f"^data.path: cannot decode the image k.png in a.tar .*{sentence}"):
            read_picture(data, channels, 8, "k.png in a.tar")


def test_a_file_that_may_not_be_read_is_not_said_to_be_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # as for everybody but root
        raise PermissionError(13, "Permission denied", "x.png")

    monkeypatch.setattr(Image, "open", refuse)
    (tmp_path / "x.png").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"^data\.path: cannot read the image .*x\.png \(Permission denied\); give yourself"
    ):
        read_image(tmp_path / "x.png", 8)


@pytest.mark.parametrize("name", ["a line", "10 gigapixels", "16 bits", "a text bomb"])
def test_the_header_is_enough(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before training finds it, and reading it decodes nothing."""
    data, sentence = REFUSED[name]
    (tmp_path / "x.png").write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for read in (check_header, lambda path: read_image(path, 8)):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(330, 10), (10, 330), (320, 10), (1, 32)])
def test_what_is_not_too_long_is_cut(size: tuple[int, int]) -> None:
    long = max(size) > image_files.LONGEST * min(size)
    data = saved(Image.new("RGB", size, (9, 8, 7)), "PNG")
    if long:
        with pytest.raises(UserError, match="more than 32 times"):
            read_picture(data, 3, 16, "x")
    else:
        assert read_picture(data, 3, 16, "x").unique().tolist() == [7, 8, 9]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_run_for_a_file_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: called.append(args))
    (tmp_path / "x.png").write_bytes(EPS)
    with Image.open(tmp_path / "x.png") as file:  # Pillow alone takes it
        assert file.format == "EPS"
    with pytest.raises(UserError, match="its format is not known.: it is a PostScript program; give a picture"):
        read_image(tmp_path / "x.png", 8)
    with pytest.raises(UserError, match="its format is not known"):
        read_picture(EPS, 3, 8, "x.png")
    assert called == []


def test_one_module_opens_images() -> None:
    opening = [
        str(path.relative_to(ROOT))
        for folder in ("megadit", "launch", "tools", "benchmarks", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\b(Image|PIL)\.open\(", path.read_text(encoding="utf-8"))
    ]
    assert opening == ["megadit/data/image_files.py"]


def test_every_name_of_a_folder_is_a_format(tmp_path: Path) -> None:
    kinds = {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"}
    assert set(image_files.FORMATS.values()) == kinds
    for extension, kind in image_files.FORMATS.items():
        (tmp_path / f"a{extension}").write_bytes(saved(flat("RGB"), kind))
    images = load_folder(DataConfig(name="image-folder", path=str(tmp_path), image_size=8, condition="none"))
    assert [images.image(i).shape for i in range(len(images))] == [(3, 8, 8)] * len(image_files.FORMATS)


def test_only_the_first_of_many_frames_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(1, 40)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read_picture(data, 3, 8, "x")[0].unique().tolist() == [1], kind


def test_sizes_and_metadata_bring_no_warning(tmp_path: Path) -> None:
    """Pillow warns of 90 megapixels, which photographs have, and of tags that are not read."""
    tiff = bytearray(saved(flat("RGB"), "TIFF", software="x" * 40))
    offset = struct.unpack_from("<I", tiff, 4)[0]
    for entry in range(offset + 2, offset + 2 + 12 * struct.unpack_from("<H", tiff, offset)[0], 12):
        if struct.unpack_from("<H", tiff, entry)[0] == 305:  # software
            struct.pack_into("<I", tiff, entry + 4, 2**31 - 1)
    (tmp_path / "x.png").write_bytes(png(12000, 8000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_header(tmp_path / "x.png")
        assert image_files.decode(bytes(tiff), "x.tif").size == (8, 8)
    assert [str(warning.message) for warning in caught] == []


def old_to_rgb(image: Image.Image) -> Image.Image:
    """On white in one piece, from the definition."""
    picture = image.convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return white.convert("RGB")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1", "PA"])
def test_transparency_in_strips_is_transparency_in_one_piece(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (23, 7, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB").quantize(9) if mode in ("P", "PA") else Image.fromarray(noise)
    image = image if mode == "P" else image.convert(mode)
    if mode == "P":
        image.info["transparency"] = bytes([0, 90, 200])
    if mode in ("RGB", "L"):
        image.info["transparency"] = image.getpixel((3, 3))
    monkeypatch.setattr(image_files, "_STRIP_PIXELS", 20)
    np.testing.assert_array_equal(np.asarray(image_files.to_rgb(image)), np.asarray(old_to_rgb(image)))


def test_grey_pictures_lie_on_white_and_have_8_bits() -> None:
    clear = np.full((8, 8, 2), 40, np.uint8)
    clear[:4, :, 1], clear[4:, :, 1] = 255, 0
    assert read_picture(saved(Image.fromarray(clear, "LA"), "PNG"), 1, 8, "x")[0, :, 0].tolist() == [40] * 4 + [255] * 4


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "LAB"), ("TIFF", "1")])
def test_other_colours_are_converted(kind: str, mode: str) -> None:
    assert read_picture(saved(flat(mode), kind), 3, 8, "x").shape == (3, 8, 8)


def test_rotation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 200
    data = saved(Image.fromarray(half), "PNG", exif=exif)
    np.testing.assert_array_equal(read_picture(data, 3, 8, "x").permute(1, 2, 0).numpy(), half)
