"""A look at a set before training: empty and corrupt images and tars, and captions that are missing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megadit.data.dataset import ImageSet, source_and_indices
from megadit.data.image_files import check_header, read_rgb
from megadit.data.shards.manifest import sha256_of
from megadit.data.shards.tar_set import TarSet
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.data.sources.image_folder.tree import CAPTIONS
from megadit.errors import UserError, say
from megadit.files.text import REPLACED

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
    source, positions = source_and_indices(dataset)
    if isinstance(source, TarSet):
        return _check_tars(source, positions, seconds, decode)
    if not isinstance(source, FolderSet):
        return ImageCheck(files=0, opened=0, decoded=0)
    source.check_files()
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
    return ImageCheck(files=len(dataset), opened=opened, decoded=decoded)


def check_files(dataset: ImageSet) -> None:
    """Whether the files that a metadata.jsonl names are there. Raises UserError that names the first that is not."""
    source, _ = source_and_indices(dataset)
    if isinstance(source, FolderSet):
        source.check_files()


def _check_tars(source: TarSet, positions: Sequence[int], seconds: float, decode: int) -> ImageCheck:
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


def _spread(items: Sequence[int], count: int) -> Sequence[int]:
    """At most ``count`` of the items, evenly spaced."""
    step = max(1, -(-len(items) // max(1, count)))
    return items[::step]


_Place = tuple[ImageSet, int]  # an image of a part of the set


def check_captions(most_missing: float, *parts: ImageSet) -> None:
    """Count captions that are empty, or hold U+FFFD for what was no character, and warn of both.

    ``parts``: of one set, the training part first; what is counted are the images of all of them.

    Raises UserError where more than the share ``most_missing`` of the captions is empty, or all are.
    """
    missing: list[_Place] = []
    replaced: list[_Place] = []
    for part in parts:
        for i in range(len(part)):
            caption = part.caption(i)
            if not caption.strip():
                missing.append((part, i))
            elif REPLACED in caption:
                replaced.append((part, i))
    count = sum(map(len, parts))
    if missing:
        _judge(missing, count, most_missing)
    if replaced:
        _warn(
            f"{len(replaced)} of {count} captions hold U+FFFD in the place of what is no character "
            f"({_source(replaced[0])} first)"
        )


def _source(place: _Place) -> str:
    images, i = place
    return images.source_of(i)


def _judge(missing: list[_Place], count: int, most_missing: float) -> None:
    first, hint = _source(missing[0]), _hint(*missing[0])
    if len(missing) == count:
        raise UserError(
            f"data.condition: text, but no image of {missing[0][0].name} has a caption; choose class or none, or give "
            f"captions{hint}"
        )
    told = f"{len(missing)} of {count} images have no caption ({first} first)"
    share = len(missing) / count
    if share > most_missing:
        raise UserError(
            f"data.condition: text, but {told}; give captions{hint}, or allow it by data.max_missing_captions="
            f"{math.ceil(share * 1000) / 1000:g}"
        )
    _warn(f"{told}; they are trained on as pictures of the empty text")


def _hint(images: ImageSet, i: int) -> str:
    """Where captions are read from, and what lies there that is not read."""
    source, places = source_and_indices(images)
    i = places[i]
    if isinstance(source, TarSet):
        return " as .txt members, or as caption in .json members"
    if not isinstance(source, FolderSet):
        return ""
    if not source.lines:
        table = f"; {source.unread[0]} is not read" if source.unread else ""
        stem = PurePosixPath(source.files[i]).stem
        return f" in a metadata.jsonl, or in text files beside the images ({stem}.txt){table}"
    name = os.path.splitext(source.files[i])[0]
    beside = next((name + ending for ending in CAPTIONS if Path(source.root, name + ending).is_file()), None)
    if beside is not None:
        return f" (metadata.jsonl alone is read, and not {beside}: write its text into the line, or remove the first)"
    keys = f"; there is also {', '.join(source.unread)}" if source.unread else ""
    return f" under the key caption or text of metadata.jsonl{keys}"


def _warn(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"warning: {text}")
