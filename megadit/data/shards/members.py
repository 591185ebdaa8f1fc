"""Readers and writers of the members of a tar: arrays, pictures, JSON and texts.

Nothing is unpickled: arrays of objects are refused. In messages ``where`` names the member and its tar.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megadit.config.schema.data import Crop
from megadit.data.image_files import centre_crop, decode
from megadit.errors import UserError, one_line
from megadit.files.file_kind import bytes_instead
from megadit.files.json_text import JsonError, parse_json
from megadit.files.npy import array_of
from megadit.files.text import decode_text, json_bytes

_REMEDY = "write the shard again"


def read_array(data: bytes, where: str) -> Tensor:
    """A ``.npy`` member as a tensor.

    Raises UserError that names ``where`` if it is damaged, holds objects, or other bytes than its header promises.
    """
    try:
        return torch.from_numpy(array_of(data))
    except Exception as error:  # numpy raises nearly anything on damaged headers
        remedy = _remedy(bytes_instead(data, "npy"))
        raise UserError(f"data.path: {where} is no array that can be read ({one_line(error, 120)}){remedy}") from None


def write_array(value: Tensor) -> bytes:
    """A CPU tensor as the bytes of a ``.npy`` file. Raises TypeError for bfloat16, which numpy does not have."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, value.contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def read_picture(data: bytes, channels: int, size: int, where: str, crop: Crop = "adm") -> Tensor:
    """An image member as uint8 (channels, size, size), cut to a centred square as ``crop`` says if its size differs.

    Raises UserError that names ``where`` when it cannot be decoded.
    """
    image = decode(data, where, channels=channels, remedy=_REMEDY)
    if image.size != (size, size):
        image = centre_crop(image, size, crop)
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1).copy())


def write_picture(image: Tensor, kind: str, quality: int) -> bytes:
    """uint8 (1 or 3, H, W) as the bytes of a png, or for any other ``kind`` of a jpg of that quality (1 to 100)."""
    pixels = image.numpy()
    picture = Image.fromarray(pixels[0] if pixels.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    if kind == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def read_json(data: bytes, where: str) -> dict[str, Any]:
    """A ``.json`` member, an object. Raises UserError that names ``where`` if it is none."""
    try:
        value = parse_json(data)
    except JsonError as error:
        raise UserError(f"data.path: {where} {error}{_remedy(bytes_instead(data, 'json', 'text'))}") from None
    if not isinstance(value, dict):
        raise UserError(f"data.path: {where} is not a JSON object; {_REMEDY}")
    return value


def read_text(data: bytes, where: str) -> str:
    """A ``.txt`` member without the white space at its ends: UTF-8, or UTF-16 with its byte order mark.

    Raises UserError that names ``where`` if it is no text, or a git-LFS pointer or web page instead of the file.
    """
    return decode_text(data, f"data.path: {where}", f", and {_REMEDY}").strip()


def write_json(value: dict[str, Any]) -> bytes:
    """A JSON object as UTF-8 bytes, keys in the order given; names that are not UTF-8 by escapes."""
    return json_bytes(json.dumps(value, ensure_ascii=False))


def _remedy(other: str | None) -> str:
    """The end of a message about a member. other: what its bytes are instead, as ``bytes_instead`` says."""
    return f"; {_REMEDY}" if other is None else f": {other}, and {_REMEDY}"
