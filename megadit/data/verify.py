"""A quick look at the files of a set before training: what a dry run does about empty and corrupt images and tars."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megadit.data.crop import check_header, read_rgb
from megadit.data.dataset import ImageSet, Subset
from megadit.data.shards.manifest import sha256_of
from megadit.data.shards.tar_set import TarSet
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.errors import UserError

_summed: set[tuple[str, int, int]] = set()  # shards whose checksum this process has found right


@dataclass(frozen=True)
class ImageCheck:
    """How many files a set has, and how many of them were opened and fully decoded."""

    files: int
    opened: int
    decoded: int


def check_images(dataset: ImageSet, *, seconds: float = 10.0, files: int = 100_000, decode: int = 16) -> ImageCheck:
    """Open up to ``files`` files of an image folder for at most ``seconds``, and decode ``decode`` of them.

    Both are spread evenly over the set; all files that a metadata.jsonl names are looked for. Of tars, ``decode``
    samples are read whole and as many checksums compared as the time allows. Sets that are held in memory have nothing
    left to check. Raises ``UserError`` that names the first empty, corrupt or missing file.
    """
    source, indices = (dataset.source, dataset.indices) if isinstance(dataset, Subset) else (dataset, None)
    if isinstance(source, TarSet):
        return _check_tars(source, list(range(len(source)) if indices is None else indices), seconds, decode)
    if not isinstance(source, FolderSet):
        return ImageCheck(files=0, opened=0, decoded=0)
    source.check_files()
    chosen: Iterable[int] = range(len(source)) if indices is None else indices
    total = len(dataset)
    positions = list(chosen)
    end = time.monotonic() + seconds
    decoded = 0
    for index in _spread(positions, decode):
        if decoded and time.monotonic() > end:
            break
        read_rgb(source.path(index))
        decoded += 1
    opened = 0
    for index in _spread(positions, files):
        if opened and time.monotonic() > end:
            break
        check_header(source.path(index))
        opened += 1
    return ImageCheck(files=total, opened=opened, decoded=decoded)


def check_files(dataset: ImageSet) -> None:
    """Whether the files that a metadata.jsonl names are there. Raises UserError that names the first that is not."""
    source = dataset.source if isinstance(dataset, Subset) else dataset
    if isinstance(source, FolderSet):
        source.check_files()


def _check_tars(source: TarSet, positions: list[int], seconds: float, decode: int) -> ImageCheck:
    end = time.monotonic() + seconds
    chosen = _spread(positions, decode)
    views = [source] if source.mirrored is None else [source, source.mirrored]
    for index in chosen:
        for view in views:
            view.image(index), view.caption(index), view.extras(index)
    compared = 0
    for shard, expected in zip(source.shards, source.sums, strict=False):
        known = (shard.path, shard.size, shard.changed_ns)
        if known in _summed:
            continue
        if compared and time.monotonic() > end:
            break
        if sha256_of(Path(shard.path)) != expected:
            raise UserError(f"data.path: {shard.path} has other bytes than were written (SHA-256); copy it again")
        _summed.add(known)
        compared += 1
    return ImageCheck(files=len(source.shards), opened=compared, decoded=len(chosen))


def _spread(items: list[int], count: int) -> list[int]:
    """At most ``count`` of the items, evenly spaced."""
    step = max(1, -(-len(items) // max(1, count)))
    return items[::step]
