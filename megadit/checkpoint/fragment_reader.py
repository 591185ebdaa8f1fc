"""Reading any range of any stored tensor, whatever layout wrote it.

``megadit.slices`` says which elements of which fragment go where (its docstring has an example with numbers). Here
these copies are made in whole blocks, since a block has one checksum::

    fragment on disk    |  block 0  |  block 1  |  block 2  | b. 3 |
    copies                   [--- copy 0 ------------]  [1]  [2]
    block 0, 2, 3       read into a buffer, then the bytes of the copies that reach into the block are scattered
    block 1             lies inside copy 0: read straight into the tensor to fill
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megadit.checkpoint.format import BLOCK, FLOAT_BYTES, BrokenCheckpoint, FileRecord, StoredFragment
from megadit.checkpoint.fragment_files import FragmentFile
from megadit.slices import Copy, PendingSpans, ShardRegions, contiguous_spans

_SMALLEST_BUFFER = 1 << 16  # bytes


class FragmentReader:
    """The stored tensors of a checkpoint's ``folder``, in a ``with`` block, which closes the files.

    shapes: global shape by parameter.  records: what the index says of the files, none in format version 1.  block:
    bytes that share a checksum.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, Sequence[int]],
        fragments: Iterable[StoredFragment],
        records: Mapping[str, FileRecord],
        block: int = BLOCK,
    ) -> None:
        self._folder, self._shapes, self._records, self._block = folder, shapes, records, block
        self._by_tensor: dict[tuple[str, str], list[StoredFragment]] = defaultdict(list)
        for fragment in fragments:
            self._by_tensor[fragment.kind, fragment.name].append(fragment)
        self._files: dict[str, FragmentFile] = {}
        self._buffer = bytearray()

    def __enter__(self) -> FragmentReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_into(
        self, target: Tensor, kind: str, name: str, start: int = 0, shard_regions: ShardRegions | None = None
    ) -> None:
        """Fill the 1-D float32 ``target`` with elements ``start`` onward of a stored tensor, or of a shard of it.

        Raises:
            BrokenCheckpoint: a part of the range is not in the checkpoint, or is not what was written.
        """
        shape, stop = self._shapes[name], start + target.numel()
        pending = PendingSpans(contiguous_spans(shape, shard_regions, start, stop))
        direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == torch.float32
        host = target.detach() if direct else torch.empty(target.numel())
        data = host.numpy().data.cast("B") if target.numel() else memoryview(b"")
        for fragment in self._by_tensor.get((kind, name), ()):
            copies = pending.take(contiguous_spans(shape, fragment.shard_regions, fragment.start, fragment.stop))
            self._copy(
                fragment, [Copy(FLOAT_BYTES * at, FLOAT_BYTES * to, FLOAT_BYTES * n) for at, to, n in copies], data
            )
        if pending.remaining:
            raise BrokenCheckpoint(
                f"checkpoint {self._folder}: {pending.remaining} of {target.numel()} elements of {kind} of '{name}' in "
                f"[{start}, {stop}) are missing; use an earlier one"
            )
        if not direct:
            target.copy_(host)

    def check(self, fragment: StoredFragment) -> None:
        """Read all of a fragment and compare its checksums.

        Raises:
            BrokenCheckpoint: it is not what was written.
        """
        file = self._open(fragment.file)
        for number in range(-(-fragment.bytes // self._block)):
            low, high = self._bounds(fragment, number)
            file.read_block(fragment, number, self._buffer_of(high - low))

    def _copy(self, fragment: StoredFragment, copies: Sequence[Copy], target: memoryview) -> None:
        """Make ``copies``, in bytes and ordered by source, from a fragment into ``target``."""
        if not copies:
            return
        file = self._open(fragment.file)
        first = 0  # of the copies that may reach into the present block
        for number in _blocks(copies, self._block):
            low, high = self._bounds(fragment, number)
            while copies[first].source + copies[first].length <= low:
                first += 1
            source, begin, length = copies[first]
            if source <= low and source + length >= high:
                file.read_block(fragment, number, target[begin + low - source : begin + high - source])
            else:
                block = self._buffer_of(high - low)
                file.read_block(fragment, number, block)
                _scatter(block, low, copies, first, target)

    def _open(self, name: str) -> FragmentFile:
        if name not in self._files:
            self._files[name] = FragmentFile(self._folder / name, self._records.get(name), self._block)
        return self._files[name]

    def _bounds(self, fragment: StoredFragment, number: int) -> tuple[int, int]:
        """Bytes [low, high) of a fragment that are its block ``number``."""
        low = number * self._block
        return low, min(low + self._block, fragment.bytes)

    def _buffer_of(self, size: int) -> memoryview:
        if len(self._buffer) < size:
            self._buffer = bytearray(min(self._block, max(size, _SMALLEST_BUFFER)))
        return memoryview(self._buffer)[:size]


def _blocks(copies: Sequence[Copy], block: int) -> Iterator[int]:
    """Numbers of the blocks that the copies reach into, ascending, each once."""
    last = -1
    for copy in copies:
        for number in range(max(copy.source // block, last + 1), -(-(copy.source + copy.length) // block)):
            yield number
            last = number


def _scatter(block: memoryview, low: int, copies: Sequence[Copy], first: int, target: memoryview) -> None:
    """Copy the bytes of ``block``, which begins at byte ``low`` of its fragment, to where ``copies`` want them."""
    source, sink = np.frombuffer(block, np.uint8), np.frombuffer(target, np.uint8)
    for number in range(first, len(copies)):
        begin = max(copies[number].source, low)
        end = min(copies[number].source + copies[number].length, low + len(block))
        if begin >= end:
            break
        to = copies[number].target - copies[number].source
        sink[to + begin : to + end] = source[begin - low : end - low]
