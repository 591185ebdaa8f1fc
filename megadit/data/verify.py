"""Checks of a set before training: empty and corrupt images and tars, missing captions."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megadit.data.dataset import ImageSet, evenly_spaced, source_and_indices
from megadit.data.image_files import check_header, read_rgb
from megadit.data.shards.manifest import sha256_of
from megadit.data.shards.tar_set import TarSet
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.data.sources.image_folder.tree import CAPTIONS
from megadit.errors import UserError, say
from megadit.files.text import REPLACED

_verified: set[tuple[str, int, int]] = set()  # shards whose checksum this process has compared already


@dataclass(frozen=True)
class ImageCheck:
    """How many files a set has, and how many of them were opened, and fully decoded."""

    files: int
    opened: int
    decoded: int


def check_images(dataset: ImageSet, *, seconds: float = 10.0, files: int = 100_000, decode: int = 16) -> ImageCheck:
    """Open up to ``files`` files of an image folder for at most ``seconds``, and decode ``decode`` of them.

    Both are evenly spaced over the set; all files that a metadata.jsonl names must exist. Of tars, ``decode`` samples
    are read and as many checksums compared as the time allows. Nothing of sets in memory is left to check. Raises
    ``UserError`` that names the first empty, corrupt or missing file.
    """
    source, positions = source_and_indices(dataset)
    if isinstance(source, TarSet):
        return _check_tars(source, positions, seconds, decode)
    if not isinstance(source, FolderSet):
        return ImageCheck(files=0, opened=0, decoded=0)
    source.check_files()
    end = time.monotonic() + seconds
    decoded = 0
    for index in evenly_spaced(positions, decode):
        if decoded and time.monotonic() > end:
            break
        read_rgb(source.path(index))
        decoded += 1
    opened = 0
    for index in evenly_spaced(positions, files):
        if opened and time.monotonic() > end:
            break
        check_header(source.path(index))
        opened += 1
    return ImageCheck(files=len(dataset), opened=opened, decoded=decoded)


def check_files(dataset: ImageSet) -> None:
    """Raise UserError, naming the first, where files that a metadata.jsonl names do not exist."""
    source, _ = source_and_indices(dataset)
    if isinstance(source, FolderSet):
        source.check_files()


def _check_tars(source: TarSet, positions: Sequence[int], seconds: float, decode: int) -> ImageCheck:
    end = time.monotonic() + seconds
    chosen = evenly_spaced(positions, decode)
    views = [source] if source.mirrored is None else [source, source.mirrored]
    for index in chosen:
        for view in views:
            view.image(index), view.caption(index), view.extras(index)
    compared = 0
    for shard, expected in zip(source.shards, source.sums, strict=False):
        version = (shard.path, shard.size, shard.changed_ns)
        if version in _verified:
            continue
        if compared and time.monotonic() > end:
            break
        if sha256_of(Path(shard.path)) != expected:
            raise UserError(f"data.path: {shard.path} has other bytes than were written (SHA-256); copy it again")
        _verified.add(version)
        compared += 1
    return ImageCheck(files=len(source.shards), opened=compared, decoded=len(chosen))


def check_captions(most_missing: float, *parts: ImageSet) -> None:
    """Count captions that are empty, or hold U+FFFD for bytes that are no character, and warn of both.

    ``parts``: of one set, the training part first; the captions of all of them are counted.

    Raises UserError where more than the share ``most_missing`` of the captions is empty, or all are.
    """
    missing: list[tuple[ImageSet, int]] = []
    replaced: list[tuple[ImageSet, int]] = []
    for part in parts:
        for i in range(len(part)):
            caption = part.caption(i)
            if not caption.strip():
                missing.append((part, i))
            elif REPLACED in caption:
                replaced.append((part, i))
    count = sum(map(len, parts))
    if missing:
        _check_missing(missing, count, most_missing)
    if replaced:
        images, i = replaced[0]
        _warn(
            f"{len(replaced)} of {count} captions hold U+FFFD in the place of what is no character "
            f"({images.source_of(i)} first)"
        )


def _check_missing(missing: list[tuple[ImageSet, int]], count: int, most_missing: float) -> None:
    images, i = missing[0]
    hint = _caption_hint(images, i)
    if len(missing) == count:
        raise UserError(
            f"data.condition: text, but no image of {images.name} has a caption; choose class or none, or give "
            f"captions{hint}"
        )
    problem = f"{len(missing)} of {count} images have no caption ({images.source_of(i)} first)"
    share = len(missing) / count
    if share > most_missing:
        raise UserError(
            f"data.condition: text, but {problem}; give captions{hint}, or allow it by data.max_missing_captions="
            f"{math.ceil(share * 1000) / 1000:g}"
        )
    _warn(f"{problem}; they are trained on as pictures of the empty text")


def _caption_hint(images: ImageSet, i: int) -> str:
    """Where captions are read from, and which files there are not read."""
    source, indices = source_and_indices(images)
    i = indices[i]
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
