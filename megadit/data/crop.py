"""Cutting the square in the centre of an image, scaled to a size; and reading a file so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.config.schema.data import Crop
from megadit.data.image_files import REMEDY, check, decode
from megadit.errors import UserError, why_unreadable


def centre_crop(image: Image.Image, size: int, crop: Crop = "adm") -> Image.Image:
    """A size x size crop.

    ``adm``: as ADM makes it (Dhariwal & Nichol 2021), and DiT after it. Halve with a box filter while the shorter side
    is at least twice ``size``, scale bicubically until the shorter side is ``size``, then cut the centre.

    ``center``: as PixArt-alpha's ``T.Resize(size), T.CenterCrop(size)`` of torchvision. Scale bilinearly (antialiased,
    torchvision's default) until the shorter side is ``size``, the longer side rounded down, then cut the centre.

    The scaled image is made whole: with ``image_files.LONGEST`` as the most that a picture is longer than wide, it has
    at most so many times the pixels of the result. Cutting first would give other pixels, since Pillow rounds the place
    of a cut to float32, and chooses by the sides whether it scales rows or columns first.
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

    Raises ``UserError`` that names the file when it is empty, corrupt, not an image, or one that is not taken.
    """
    image = centre_crop(read_rgb(path), size, crop)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def read_rgb(path: Path) -> Image.Image:
    """The fully decoded file in mode RGB. Raises ``UserError`` as ``read_image`` does."""
    check_not_empty(path)
    return decode(path, str(path))


def check_header(path: Path) -> None:
    """Open a file and verify what its format lets one verify without decoding (for PNG: every checksum).

    Raises ``UserError`` as ``read_image`` does.
    """
    check_not_empty(path)
    check(path, str(path))


def check_not_empty(path: Path) -> None:
    """Raise ``UserError`` when the file is missing or has no bytes."""
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data.path: {path} is an empty file; {REMEDY}")
    except OSError as error:
        raise UserError(f"data.path: cannot read {path} {why_unreadable(error, REMEDY)}") from None
