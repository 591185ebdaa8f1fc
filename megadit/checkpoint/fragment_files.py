"""Fragment files: named ranges of float32 tensors, written as safetensors and verified block by block.

The writer streams: it holds one fragment at a time on the host, where ``safetensors.torch.save_file`` would hold all
of a rank's bytes once more. The files are ordinary safetensors files. Every block of a fragment has a CRC-32, kept in
the checkpoint's index, so that a rank that needs a part of a fragment verifies what it reads and reads no more.
CRC-32 because it finds what disks and networks do to files, and is the fastest of the standard library: on the
machine of docs/benchmarks.md 3.4 GiB/s, where blake2b reaches 0.8 and SHA-256 1.5.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megadit.checkpoint.format import BLOCK, BrokenCheckpoint, FileRecord, StoredFragment
from megadit.files.paths import safetensors_header


def write_fragments(
    path: Path, fragments: Sequence[tuple[StoredFragment, Tensor]]
) -> tuple[FileRecord, list[StoredFragment]]:
    """Write 1-D float32 tensors, one after the other, and flush them to the disk.

    Returns what the index needs: the file's record, and the fragments with their checksums. Raises OSError where the
    file cannot be written.
    """
    head = safetensors_header({fragment.key: [fragment.stop - fragment.start] for fragment, _ in fragments})
    written = []
    with open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(head))
        for fragment, values in fragments:
            if values.numel() != fragment.stop - fragment.start:
                raise ValueError(f"{fragment.key}: {values.numel()} values for [{fragment.start}, {fragment.stop})")
            data = values.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")
            checksums = []
            for low in range(0, len(data), BLOCK):
                block = data[low : low + BLOCK]
                checksums.append(zlib.crc32(block))
                _write_all(file, block)
            written.append(replace(fragment, crc32=tuple(checksums)))
        os.fsync(file.fileno())
    return FileRecord(len(head) + sum(fragment.bytes for fragment in written), zlib.crc32(head)), written


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


class FragmentFile:
    """An open fragment file. Its size and header are verified when it is opened, a block when it is read.

    ``record`` is what the index says of the file, None in format version 1. ``block`` is the bytes of a checksum's
    block.

    Raises:
        BrokenCheckpoint: it cannot be read, or is not what was written.
    """

    def __init__(self, path: Path, record: FileRecord | None, block: int) -> None:
        self._path, self._block = path, block
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
            self._entries: dict[str, Any] = json.loads(head[8:])
            ends = [_end_of(entry) for key, entry in self._entries.items() if key != "__metadata__"]
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
        self._read(memoryview(head), 0)
        return bytes(head)

    def read_block(self, fragment: StoredFragment, number: int, into: memoryview) -> None:
        """Fill ``into``, as long as the block, with block ``number`` of a fragment, and compare its checksum.

        Raises:
            BrokenCheckpoint: the file does not hold the fragment, ends too early, or the checksum is another.
        """
        entry = self._entries.get(fragment.key)
        if entry is None or entry["data_offsets"][1] - entry["data_offsets"][0] != fragment.bytes:
            raise self._broken(f"'{fragment.key}' is not in it")
        self._read(into, self._data + int(entry["data_offsets"][0]) + number * self._block)
        checksums = fragment.crc32
        if checksums is not None and (number >= len(checksums) or zlib.crc32(into) != checksums[number]):
            raise BrokenCheckpoint(
                f"checkpoint {self._path.parent}: {fragment.kind} of '{fragment.name}' in {fragment.file} has a wrong "
                "checksum; use an earlier one"
            )

    def _read(self, into: memoryview, offset: int) -> None:
        while into:
            try:
                count = os.preadv(self._handle, [into], offset)
            except OSError as error:
                raise self._broken(error.strerror or str(error)) from error
            if count == 0:
                raise self._broken("it ends too early")
            into, offset = into[count:], offset + count

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        os.close(self._handle)

    def _broken(self, reason: str) -> BrokenCheckpoint:
        return BrokenCheckpoint(f"checkpoint {self._path}: cannot be read ({reason}); use an earlier one")


def _end_of(entry: Any) -> int:
    first, end = entry["data_offsets"]
    if type(first) is not int or type(end) is not int or not 0 <= first <= end:
        raise ValueError("offsets that are none")
    return end
