"""Torch files written tensor by tensor, where ``torch.save`` needs all of them in memory.

Written is what ``torch.save`` writes since torch 1.6, a zip archive without compression: ``data.pkl``, the structure
with a number in place of each tensor's values, and these in ``data/0``, ``data/1``, …, aligned for mapping.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from pickle import Pickler
from typing import Any

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2  # the name under which torch files hold tensors

from megadit.convert.deferred import loaded

_ALIGNMENT = 64  # of the values in the file, as torch.save has it
_PADDING = b"FB"  # the extra field that torch fills up with
_ZIP64_EXTRA, _LOCAL_HEADER = 20, 30  # bytes, beside name and extra fields
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class _Storage:
    """Stands for the values of a tensor, number ``key`` of the file."""

    def __init__(self, key: int, tensor: Tensor) -> None:
        self.key, self.tensor = key, tensor


class _Pickler(Pickler):
    """Pickles tensors as torch does, but for their values, which are kept for later."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.stored: list[Tensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return NotImplemented
        self.stored.append(obj)
        strides = torch.empty(obj.shape, device="meta").stride()  # of the values as they are written
        storage = _Storage(len(self.stored) - 1, obj)
        return _rebuild_tensor_v2, (storage, 0, tuple(obj.shape), strides, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGES[obj.tensor.dtype], str(obj.key), "cpu", obj.tensor.numel()


def save_streaming(value: Any, path: Path) -> None:
    """Write ``value``, plain containers of tensors, as ``torch.save`` does; deferred tensors are loaded one by one.

    A tensor that stands in two places is written once; tensors that share memory are written each.

    Raises:
        OSError: it cannot be written.
    """
    text = io.BytesIO()
    pickler = _Pickler(text)
    pickler.dump(value)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", text.getvalue())
        _add(archive, "byteorder", b"little")
        for number, tensor in enumerate(pickler.stored):
            values: Tensor = loaded(tensor).detach().contiguous()
            _add(archive, f"data/{number}", values.view(-1).view(torch.uint8).numpy().data if values.numel() else b"")
            del values
        _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    entry = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None
    large = _ZIP64_EXTRA if len(data) * 1.05 > zipfile.ZIP64_LIMIT else 0  # what writestr puts before it
    begin = archive.fp.tell() + _LOCAL_HEADER + len(entry.filename) + large + 4
    fill = -begin % _ALIGNMENT
    entry.extra = struct.pack("<2sH", _PADDING, fill) + b"Z" * fill
    archive.writestr(entry, data)
