"""Reading image files: accepted formats, sizes and aspect ratios, and the crop to a square.

All images are read here. The header is checked before a pixel is decoded. No decoder runs another program: Pillow hands
an EPS file to Ghostscript whatever its name is, so that only the formats of ``FORMATS`` are opened.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.config.schema.data import Crop
from megadit.errors import UserError, one_line, why_unreadable
from megadit.files.file_kind import PICTURES, bytes_instead, file_instead


def centre_crop(image: Image.Image, size: int, crop: Crop = "adm") -> Image.Image:
    """A size x size crop.

    ``adm``: as ADM makes it (Dhariwal & Nichol 2021), and DiT after it. Halve with a box filter while the shorter side
    is at least twice ``size``, scale bicubically until the shorter side is ``size``, then cut the centre.

    ``center``: as PixArt-alpha's ``T.Resize(size), T.CenterCrop(size)`` of torchvision. Scale bilinearly (antialiased,
    torchvision's default) until the shorter side is ``size``, the longer side rounded down, then cut the centre.

    The whole image is scaled, then cut: with ``LONGEST`` as the limit of its aspect ratio it has at most so many times
    the pixels of the result. Cutting first would give other pixels, since Pillow rounds the box of a cut to float32,
    and chooses by the sides whether it scales rows or columns first.
    """
    return _adm(image, size) if crop == "adm" else _center(image, size)


def _adm(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _center(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    if short != size:
        width, height = (size * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)  # half to even, as torchvision's
    return image.crop((left, top, left + size, top + size))


def read_image(path: Path, size: int, crop: Crop = "adm") -> Tensor:
    """A file as uint8 (3, size, size): RGB (transparency on white), cut as ``centre_crop`` does. EXIF rotation is not
    applied.

    Raises ``UserError`` that names the file when it is empty, corrupt, not an image, or of an unsupported kind.
    """
    image = centre_crop(read_rgb(path), size, crop)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def read_rgb(path: Path) -> Image.Image:
    """The fully decoded file in mode RGB. Raises ``UserError`` as ``read_image`` does."""
    check_not_empty(path)
    return decode(path, str(path))


def check_header(path: Path) -> None:
    """Open a file and verify it as far as its format allows without decoding (for PNG: every checksum).

    Raises ``UserError`` as ``read_image`` does.
    """
    check_not_empty(path)
    with _opened(path, str(path), "data.path", REMEDY, LONGEST) as file:
        file.verify()


def check_not_empty(path: Path) -> None:
    """Raise ``UserError`` when the file is missing or has no bytes."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data.path: {path} is an empty file; {REMEDY}")
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} {why_unreadable(error, REMEDY)}") from None


# The extensions of image files, and Pillow's name of the format. The content decides the format of a file.
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
# Where Pillow itself refuses, too: 0.7 GB decoded, twice as much while converted. A file of a few KB may promise any.
MOST_PIXELS = 178_956_970
# The largest aspect ratio: a square shows less than 1/32 of longer pictures (rules, spacers, damaged headers). So the
# scaled picture has at most 32 times the pixels of the square; photographs and panoramas have 1 to 12.
LONGEST = 32
REMEDY = "replace the file or take it out of the set"

_READ = tuple(kind for kind in PICTURES if kind != "heif")  # AVIF aside, Pillow reads none of its kinds
_STRIP_PIXELS = 1 << 22  # transparency is laid on white in strips of about so many
_FROM_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_LONG_TEXT = "PngImagePlugin.MAX_TEXT"  # in Pillow's message, 1 MB a text
_COUNT = re.compile(r"\((\d+) pixels\)")  # in Pillow's message


class _Unsupported(ValueError):
    """A picture that is refused although it may be intact, with a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def decode(
    source: Path | bytes,
    where: str,
    *,
    channels: int = 3,
    key: str = "data.path",
    remedy: str = REMEDY,
    longest: int | None = LONGEST,
) -> Image.Image:
    """The (first) picture in mode RGB, or L for one channel; transparency on white, EXIF rotation not applied.

    where: what to call the file in a message that begins with ``key`` and ends with ``remedy``.
    longest: how many times its shorter side a picture may be long; None: any.
    Raises ``UserError`` when it is damaged, of another format, of more than 8 bits per channel, too large or too long.
    """
    with _opened(source, where, key, remedy, longest) as file:
        file.load()
        return _to_grey(file) if channels == 1 else to_rgb(file)


@contextmanager
def _opened(source: Path | bytes, where: str, key: str, remedy: str, longest: int | None) -> Iterator[Image.Image]:
    """A file whose header is checked; any error until the block ends is raised as ``UserError``."""
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as file:
            _check_size_and_mode(file, longest)
            yield file
    except MemoryError:
        raise  # this machine's fault, not the file's
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have no number
            raise UserError(f"{key}: cannot read the image {where} {why_unreadable(error, remedy)}") from None
        message = f"{key}: cannot decode the image {where} ({_reason(error)})"
        known = _known_remedy(error)
        if known is not None:
            raise UserError(f"{message}; {known}") from None
        kinds = _READ if isinstance(error, Image.UnidentifiedImageError) else PICTURES
        other = bytes_instead(source, *kinds) if isinstance(source, bytes) else file_instead(source, *kinds)
        raise UserError(f"{message}; {remedy}" if other is None else f"{message}: {other}, else {remedy}") from None


def _check_size_and_mode(file: Image.Image, longest: int | None) -> None:
    """Raise ``_Unsupported`` where the header of a picture has too many pixels, too long a side or another mode."""
    width, height = file.size
    if width * height > MOST_PIXELS:  # where Pillow's own check was disabled
        raise Image.DecompressionBombError(f"({width * height} pixels)")
    if longest is not None and max(width, height) > longest * min(width, height):
        raise _Unsupported(
            f"it is {width} x {height} pixels, more than {longest} times as long as wide, and a square would show next "
            "to nothing of it",
            "cut it, or take it out of the set",
        )
    if file.mode == "F" or file.mode.startswith("I"):
        raise _Unsupported(f"its pixels are of Pillow's mode {file.mode}, but 8 bits per channel are needed", REMEDY)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in mode RGB, transparency on white; the image itself if it is in this mode already."""
    if not _has_transparency(image):
        return image if image.mode == "RGB" else image.convert("RGB")
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def _to_grey(image: Image.Image) -> Image.Image:
    return (to_rgb(image) if _has_transparency(image) else image).convert("L")


def _has_transparency(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS``, and AVIF, which servers send under any name, where this Pillow knows it."""
    avif = ("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()
    return (*dict.fromkeys(FORMATS.values()), *avif)


def _silence_pillow() -> None:
    """Pillow warns of sizes, which are checked here, and of damaged metadata, which is not read."""
    if _FROM_PILLOW not in warnings.filters:  # every time, since others may have reset them
        warnings.filterwarnings("ignore", module=_FROM_PILLOW[3].pattern)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is not known"
    if isinstance(error, Image.DecompressionBombError):
        count = _COUNT.search(str(error))
        many = f"{int(count[1]):,}" if count else "too many"
        return f"it has {many} pixels, and pictures of more than {MOST_PIXELS:,} are not decoded"
    if _LONG_TEXT in str(error):
        return "a text or a colour profile in it is too large when unpacked"
    return one_line(error)


def _known_remedy(error: Exception) -> str | None:
    """The remedy for a file that is refused although it may be intact; None for a damaged one."""
    if isinstance(error, Image.DecompressionBombError):
        return "scale it down, or take it out of the set"
    if _LONG_TEXT in str(error):
        return "save it again without texts and profile, or take it out of the set"
    return error.remedy if isinstance(error, _Unsupported) else None
