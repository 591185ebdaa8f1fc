"""Whether the images of a text-conditional run have captions, counted before training."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

from megadit.data.dataset import ImageSet, Subset
from megadit.data.shards.tar_set import TarSet
from megadit.data.sources.image_folder.folder_set import FolderSet
from megadit.data.sources.image_folder.tree import CAPTIONS
from megadit.errors import UserError, say
from megadit.files.text import REPLACED

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
    source, i = (images.source, images.indices[i]) if isinstance(images, Subset) else (images, i)
    if isinstance(source, TarSet):
        return " as .txt members, or as caption in .json members"
    if not isinstance(source, FolderSet):
        return ""
    if not source.lines:
        table = f"; {source.unread[0]} is not read" if source.unread else ""
        stem = PurePosixPath(source.files[i]).stem
        return f" in a metadata.jsonl, or in text files beside the images ({stem}.txt){table}"
    beside = next((name for name in _side_files(source.files[i]) if Path(source.root, name).is_file()), None)
    if beside is not None:
        return f" (metadata.jsonl alone is read, and not {beside}: write its text into the line, or remove the first)"
    keys = f"; there is also {', '.join(source.unread)}" if source.unread else ""
    return f" under the key caption or text of metadata.jsonl{keys}"


def _side_files(name: str) -> list[str]:
    return [os.path.splitext(name)[0] + ending for ending in CAPTIONS]


def _warn(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        say(f"warning: {text}")
