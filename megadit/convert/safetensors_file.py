"""Safetensors files, tensor by tensor: the header is checked, and each tensor's bytes are read when it is needed.

The library maps a file as a whole, so that what was read stays in the process's memory, and takes the last of two
entries of one name without a word. Here a tensor is read into memory of its own. Format:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megadit.convert.deferred import deferred
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.files.json_fields import shown
from megadit.files.json_text import JsonError, parse_json

_MOST_HEADER = 100_000_000  # bytes, as the library has it
_MOST_DIMS = 64
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: bytes [first, last) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    last: int


class SafetensorsFile:
    """A safetensors file whose header was read and checked; the file is opened for each tensor that is read.

    Raises:
        UserError: it cannot be read, is none, or its header and its bytes do not agree; the tensor is named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        try:
            self._read()
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from error
        except JsonError as error:
            raise self._broken(f"its header {error}") from None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in the order of the file; each is read when it is needed, into memory of its own."""
        return {name: deferred(entry.shape, entry.dtype, self._loader(name)) for name, entry in self._entries.items()}

    def _read(self) -> None:
        if self.path.exists() and not self.path.is_file():
            raise self._broken("it is no regular file")
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(8)
            length = int.from_bytes(begin, "little")
            if len(begin) < 8 or not 2 <= length <= size - 8:
                raise self._broken("it has no header of a length that fits into it")
            if length > _MOST_HEADER:
                raise self._broken(f"its header has {length:,} bytes, more than the {_MOST_HEADER:,} of the format")
            header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise self._broken("its header is no object of names")
        metadata = header.pop("__metadata__", {})
        if isinstance(metadata, dict):  # it is for people, and for megadit's own files
            self.metadata = {key: value for key, value in metadata.items() if isinstance(value, str)}
        entries = [(name, self._entry(name, values, 8 + length)) for name, values in header.items()]
        position = 8 + length
        for name, entry in sorted(entries, key=lambda pair: (pair[1].first, pair[1].last)):
            if entry.first != position:
                problem = "overlaps the tensor before it" if entry.first < position else "leaves a gap before it"
                raise self._broken(f"'{name}' {problem}", name)
            position = entry.last
        if position != size:
            problem = "ends before" if position > size else "goes on after"
            raise self._broken(f"the file of {size:,} bytes {problem} its last tensor, which ends at {position:,}")
        self._entries = dict(entries)

    def _entry(self, name: str, values: Any, data: int) -> _Entry:
        values = values if isinstance(values, dict) else {}
        kind, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise UserError(
                f"{self.path}: '{name}' is of type {shown(kind)}, which is not read here; known are "
                f"{', '.join(_DTYPES)}: save it anew in one of these"
            )
        if not _are_counts(shape) or len(shape) > _MOST_DIMS:
            raise self._broken(f"'{name}' has no shape", name)
        if not _are_counts(offsets) or len(offsets) != 2:
            raise self._broken(f"'{name}' has no two data_offsets", name)
        bytes_ = math.prod(shape) * _DTYPES[kind].itemsize
        if offsets[1] - offsets[0] != bytes_:
            raise self._broken(
                f"'{name}' of type {kind} and shape {shown(shape)} has {shown(bytes_)} bytes, its data_offsets say "
                f"{shown(offsets[1] - offsets[0])}",
                name,
            )
        if math.prod(max(size, 1) for size in shape) >= 2**63:  # of a tensor without elements
            raise self._broken(f"'{name}' has no shape that a tensor can have", name)
        return _Entry(_DTYPES[kind], tuple(shape), data + offsets[0], data + offsets[1])

    def _loader(self, name: str) -> Any:
        entry = self._entries[name]

        def load() -> Tensor:
            values = torch.empty(entry.shape, dtype=entry.dtype)
            into = values.view(-1).view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
            try:
                with open(self.path, "rb", buffering=0) as file:
                    file.seek(entry.first)
                    while into:
                        count = file.readinto(into)
                        if not count:
                            raise self._broken(f"it ends within '{name}'")
                        into = into[count:]
            except OSError as error:
                raise self._broken(f"'{name}': {error.strerror or error}") from error
            return values

        return load

    def _broken(self, reason: str, tensor: str = "") -> UserError:
        other = None if tensor else file_instead(self.path, "safetensors")
        if other is not None:
            return UserError(f"{self.path}: cannot be read as safetensors: {other}")
        return UserError(f"{self.path}: cannot be read as safetensors ({reason}); copy it again")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
