"""Tars as people have them: small images in members of any name, and what goes wrong with the files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from PIL import Image

Members = Mapping[str, bytes] | Iterable[tuple[str, bytes]]


def png(value: int = 0, size: int = 8) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def samples(first: int, last: int) -> dict[str, bytes]:
    """Members of the samples 0000, 0001, ...: png, cls and txt."""
    members: dict[str, bytes] = {}
    for i in range(first, last):
        members |= {f"{i:04d}.png": png(i), f"{i:04d}.cls": b"%d" % (i % 3), f"{i:04d}.txt": b"picture %d" % i}
    return members


def write_tar(
    path: Path,
    members: Members,
    format: int = tarfile.PAX_FORMAT,
    changed: Callable[[tarfile.TarInfo], None] = lambda info: None,
) -> Path:
    """Write members in their order. ``changed`` is called with each header before it is written."""
    items = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            changed(info)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def tar_bytes(members: Members, **kwargs: object) -> bytes:
    """The same as bytes."""
    buffer = io.BytesIO()
    items = members.items() if isinstance(members, Mapping) else members
    with tarfile.open(fileobj=buffer, mode="w", **kwargs) as tar:  # type: ignore[call-overload]
        for name, data in items:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def block(name: str, size: int = 0, type: bytes = b"0", **fields: bytes) -> bytes:
    """One header by hand. ``size_field`` stands in place of the size, checksum included."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, type
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    if "size_field" in fields:
        head[124:136] = fields["size_field"].ljust(12, b"\0")
    return sealed(head)


def sealed(head: bytearray) -> bytes:
    """A header with the checksum that its other bytes have."""
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def padded(data: bytes) -> bytes:
    """Data as they stand in a tar."""
    return data + b"\0" * (-len(data) % 512)


END = b"\0" * 1024
