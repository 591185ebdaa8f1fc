"""A quick look at the files of a set before training: what a dry run does about empty and corrupt images."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from megadit.data.crop import check_header, read_rgb
from megadit.data.dataset import ImageSet, Subset
from megadit.data.folder import FolderSet


@dataclass(frozen=True)
class ImageCheck:
    """How many files a set has, and how many of them were opened and fully decoded."""

    files: int
    opened: int
    decoded: int


def check_images(dataset: ImageSet, *, seconds: float = 10.0, files: int = 100_000, decode: int = 16) -> ImageCheck:
    """Open up to ``files`` files of an image folder for at most ``seconds``, and decode ``decode`` of them.

    Both are spread evenly over the set. Sets that are held in memory have nothing left to check.
    Raises ``UserError`` that names the first empty, corrupt or missing file.
    """
    source, indices = (dataset.source, dataset.indices) if isinstance(dataset, Subset) else (dataset, None)
    if not isinstance(source, FolderSet):
        return ImageCheck(files=0, opened=0, decoded=0)
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


def _spread(items: list[int], count: int) -> list[int]:
    """At most ``count`` of the items, evenly spaced."""
    step = max(1, -(-len(items) // max(1, count)))
    return items[::step]
