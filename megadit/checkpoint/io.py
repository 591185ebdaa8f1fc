"""Reading and writing named fragments of float32 tensors as safetensors files, checked while they pass.

The writer streams: it holds one fragment at a time on the host, where ``safetensors.torch.save_file`` would
hold all of a rank's bytes once more. The files are ordinary safetensors files. Every block of a tensor has a CRC-32,
kept in the checkpoint's index, so that a rank that needs a part of a tensor checks what it reads and reads no more.
CRC-32 because it finds what disks and networks do to files, and is the fastest of the standard library: on the
machine of docs/benchmarks.md 3.4 GiB/s, where blake2b reaches 0.8 and SHA-256 1.5.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadit.errors import UserError
from megadit.slices import Boxes, Wanted, runs

BLOCK = 1 << 20  # bytes that share a checksum
_BYTES = 4  # float32


class BrokenCheckpoint(UserError):
    """A checkpoint whose files are not what was written: torn, corrupt or incomplete. An earlier one may be sound."""


@dataclass(frozen=True)
class Piece:
    """Where elements [start, stop) of a flattened tensor of ``kind`` (weights, exp_avg, …) lie.

    They are counted in the whole parameter ``name``, or in its slice ``boxes`` (megadit.slices). ``crc32`` has
    one checksum per block of the piece's bytes; None in files of format version 1.
    """

    kind: str
    name: str
    start: int
    stop: int
    file: str
    boxes: Boxes | None = None
    crc32: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The tensor's key in its safetensors file."""
        return f"{self.kind}/{self.name}@{self.start}"

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return (self.stop - self.start) * _BYTES

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the index; what is None is left out."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Piece:
        """What ``to_json`` gave, after its passage through JSON."""
        boxes, sums = values.get("boxes"), values.get("crc32")
        return cls(
            **{key: values[key] for key in ("kind", "name", "start", "stop", "file")},
            boxes=None if boxes is None else tuple(tuple((low, high) for low, high in box) for box in boxes),
            crc32=None if sums is None else tuple(sums),
        )


@dataclass(frozen=True)
class FileRecord:
    """What the index says of a file: its size, and the checksum of its safetensors header or, elsewhere, of all."""

    bytes: int
    crc32: int


def write_pieces(path: Path, pieces: Sequence[tuple[Piece, Tensor]]) -> tuple[FileRecord, list[Piece]]:
    """Write 1-D float32 tensors, one after the other, and flush them to the disk.

    Returns what the index needs: the file's record, and the pieces with their checksums.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for piece, _ in pieces:
        end = position + piece.bytes
        header[piece.key] = {"dtype": "F32", "shape": [piece.stop - piece.start], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    head = len(text).to_bytes(8, "little") + text
    written = []
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(head))
        for piece, values in pieces:
            if values.numel() != piece.stop - piece.start:
                raise ValueError(f"{piece.key}: {values.numel()} values for [{piece.start}, {piece.stop})")
            data = values.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")
            sums = []
            for low in range(0, len(data), BLOCK):
                block = data[low : low + BLOCK]
                sums.append(zlib.crc32(block))
                _write_all(file, block)
            written.append(replace(piece, crc32=tuple(sums)))
        os.fsync(file.fileno())
    return FileRecord(len(head) + position, zlib.crc32(head)), written


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


class PieceReader:
    """Reads any part of any stored tensor, whatever parts it was written in, and checks every block that it reads."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Sequence[int]],
        pieces: Iterable[Piece],
        files: Mapping[str, FileRecord],
        block: int = BLOCK,
    ) -> None:
        self._folder, self._shapes, self._records, self._block = folder, shapes, files, block
        self._by_tensor: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        for piece in pieces:
            self._by_tensor[piece.kind, piece.name].append(piece)
        self._files: dict[str, _PieceFile] = {}
        self._buffer = bytearray()

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_into(self, target: Tensor, kind: str, name: str, start: int = 0, boxes: Boxes | None = None) -> None:
        """Fill the 1-D float32 ``target`` with elements ``start`` onward of a stored tensor, or of its slice ``boxes``.

        Raises:
            BrokenCheckpoint: a part of the range is not in the checkpoint, or is not what was written.
        """
        shape, stop = self._shapes[name], start + target.numel()
        wanted = Wanted(runs(shape, boxes, start, stop))
        direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == torch.float32
        host = target.detach() if direct else torch.empty(target.numel())
        data = host.numpy().data.cast("B") if target.numel() else memoryview(b"")
        for piece in self._by_tensor.get((kind, name), ()):
            taken = wanted.take(runs(shape, piece.boxes, piece.start, piece.stop))
            if taken:
                self._read(piece, taken, data)
        if wanted.left:
            raise BrokenCheckpoint(
                f"checkpoint {self._folder}: {wanted.left} of {target.numel()} elements of {kind} of '{name}' in "
                f"[{start}, {stop}) are missing; use an earlier one"
            )
        if not direct:
            target.copy_(host)

    def check(self, piece: Piece) -> None:
        """Read all of a piece and compare its checksums.

        Raises:
            BrokenCheckpoint: it is not what was written.
        """
        self._read(piece, [], memoryview(b""), everything=True)

    def _open(self, name: str) -> _PieceFile:
        if name not in self._files:
            self._files[name] = _PieceFile(self._folder / name, self._records.get(name))
        return self._files[name]

    def _read(
        self, piece: Piece, taken: Sequence[tuple[int, int, int]], target: memoryview, everything: bool = False
    ) -> None:
        """Copy (place in the piece, place in the target, count) elements, whole blocks at a time."""
        file = self._open(piece.file)
        offset = file.offset_of(piece)
        spans = [(at * _BYTES, to * _BYTES, count * _BYTES) for at, to, count in taken]
        blocks = range(-(-piece.bytes // self._block)) if everything else _blocks(spans, self._block)
        begin = 0  # the first span that may reach into the present block
        for number in blocks:
            low = number * self._block
            high = min(low + self._block, piece.bytes)
            while begin < len(spans) and spans[begin][0] + spans[begin][2] <= low:
                begin += 1
            if begin < len(spans) and spans[begin][0] <= low and spans[begin][0] + spans[begin][2] >= high:
                at, to, _ = spans[begin]
                file.read(target[to + low - at : to + high - at], offset + low)
                self._compare(piece, number, target[to + low - at : to + high - at])
                continue
            if len(self._buffer) < high - low:
                self._buffer = bytearray(min(self._block, max(high - low, 1 << 16)))
            block = memoryview(self._buffer)[: high - low]
            file.read(block, offset + low)
            self._compare(piece, number, block)
            if begin < len(spans):
                _scatter(spans, begin, low, high, block, target)

    def _compare(self, piece: Piece, number: int, block: memoryview) -> None:
        if piece.crc32 is None:
            return
        if number >= len(piece.crc32) or zlib.crc32(block) != piece.crc32[number]:
            raise BrokenCheckpoint(
                f"checkpoint {self._folder}: {piece.kind} of '{piece.name}' in {piece.file} has a wrong checksum; "
                "use an earlier one"
            )


def _blocks(spans: Sequence[tuple[int, int, int]], size: int) -> Iterator[int]:
    """Numbers of the blocks that the spans reach into, ascending, each once."""
    last = -1
    for at, _, count in spans:
        for number in range(max(at // size, last + 1), -(-(at + count) // size)):
            yield number
            last = number


def _scatter(
    spans: Sequence[tuple[int, int, int]], begin: int, low: int, high: int, block: memoryview, target: memoryview
) -> None:
    """Copy what the spans from number ``begin`` on want of the bytes [low, high) of a piece."""
    source, sink = np.frombuffer(block, np.uint8), np.frombuffer(target, np.uint8)
    for number in range(begin, len(spans)):
        at, to, count = spans[number]
        first, end = max(at, low), min(at + count, high)
        if first >= end:
            break
        sink[to + first - at : to + end - at] = source[first - low : end - low]


def _end_of(entry: Any) -> int:
    first, end = entry["data_offsets"]
    if type(first) is not int or type(end) is not int or not 0 <= first <= end:
        raise ValueError("offsets that are none")
    return end


class _PieceFile:
    """An open safetensors file of one-dimensional float32 tensors."""

    def __init__(self, path: Path, record: FileRecord | None) -> None:
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from error
        try:
            size = os.fstat(self._handle).st_size
            if record is not None and size != record.bytes:
                raise self._broken(f"it has {size} bytes of {record.bytes}")
            head = self._read_header(size)
            if record is not None and zlib.crc32(head) != record.crc32:
                raise self._broken("its header has a wrong checksum")
            self._tensors: dict[str, Any] = json.loads(head[8:])
            ends = [_end_of(entry) for key, entry in self._tensors.items() if key != "__metadata__"]
            if size != len(head) + max(ends, default=0):
                raise self._broken(f"it has {size} bytes of {len(head) + max(ends, default=0)}")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            self.close()
            raise self._broken("its header is no safetensors header") from error
        except BrokenCheckpoint:
            self.close()
            raise
        self._data = len(head)

    def _read_header(self, size: int) -> bytes:
        start = os.pread(self._handle, 8, 0)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError("no header")
        head = bytearray(8 + length)
        self.read(memoryview(head), 0)
        return bytes(head)

    def offset_of(self, piece: Piece) -> int:
        """The byte at which a piece begins."""
        entry = self._tensors.get(piece.key)
        if entry is None or entry["data_offsets"][1] - entry["data_offsets"][0] != piece.bytes:
            raise self._broken(f"'{piece.key}' is not in it")
        return self._data + int(entry["data_offsets"][0])

    def read(self, into: memoryview, offset: int) -> None:
        """Fill a buffer from the bytes at ``offset``."""
        while into:
            try:
                count = os.preadv(self._handle, [into], offset)
            except OSError as error:
                raise self._broken(error.strerror or str(error)) from error
            if count == 0:
                raise self._broken("it ends too early")
            into, offset = into[count:], offset + count

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def _broken(self, reason: str) -> BrokenCheckpoint:
        return BrokenCheckpoint(f"checkpoint {self._path}: cannot be read ({reason}); use an earlier one")
