"""Reading one image file: decode to RGB and cut the square in its centre."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.config.data import Crop
from megadit.errors import UserError
from megadit.file_kind import PICTURES, file_instead

_REMEDY = "replace the file or take it out of the set"


def centre_crop(image: Image.Image, size: int, crop: Crop = "adm") -> Image.Image:
    """A size x size crop.

    ``adm``: as ADM makes it (Dhariwal & Nichol 2021), and DiT after it. Halve with a box filter while the shorter side
    is at least twice ``size``, scale bicubically until the shorter side is ``size``, then cut the centre.

    ``center``: as PixArt-alpha's ``T.Resize(size), T.CenterCrop(size)`` of torchvision. Scale bilinearly (antialiased,
    torchvision's default) until the shorter side is ``size``, the longer side rounded down, then cut the centre.
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

    Raises ``UserError`` that names the file when it is empty, corrupt or not an image.
    """
    image = centre_crop(read_rgb(path), size, crop)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def read_rgb(path: Path) -> Image.Image:
    """The fully decoded file in mode RGB. Raises ``UserError`` as ``read_image`` does."""
    check_not_empty(path)
    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except MemoryError:
        raise  # this machine's fault, not the file's
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise UserError(_unreadable(path, error)) from None


def check_header(path: Path) -> None:
    """Open a file and verify what its format lets one verify without decoding (for PNG: every checksum).

    Raises ``UserError`` as ``read_image`` does.
    """
    check_not_empty(path)
    try:
        with Image.open(path) as file:
            file.verify()
    except Exception as error:  # see read_rgb
        raise UserError(_unreadable(path, error)) from None


def check_not_empty(path: Path) -> None:
    """Raise ``UserError`` when the file is missing or has no bytes."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data.path: {path} is an empty file; {_REMEDY}")
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} ({error.strerror}); {_REMEDY}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """In mode RGB, transparency on white. Raises ValueError for more than 8 bits per channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}, but 8 bits per channel are needed")
    if "A" in image.getbands() or "transparency" in image.info:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        white.alpha_composite(picture)
        return white.convert("RGB")
    return image.convert("RGB")


def _unreadable(path: Path, error: Exception) -> str:
    reason = "its format is not known" if isinstance(error, Image.UnidentifiedImageError) else str(error).strip()
    reason = " ".join(reason.split()) or type(error).__name__
    other = file_instead(path, *PICTURES)
    remedy = f"; {_REMEDY}" if other is None else f": {other}, else {_REMEDY}"
    return f"data.path: cannot decode the image {path} ({reason}){remedy}"
