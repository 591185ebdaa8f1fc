"""Captions in files of their own beside the images, as kohya's scripts take them: ``0001.png`` and ``0001.txt``."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megadit.data.sources.image_folder.tree import CAPTIONS
from megadit.errors import UserError, why_unreadable
from megadit.files.text import decode_text, replace_surrogates

_THREADS = 16  # a file system in the network answers many questions at once


def read_side_files(
    root: Path, images: Sequence[str], texts: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(a caption per image, empty where it has no file, remarks). texts: the files of captions below ``root``.

    Raises UserError for a file that is not text, and where two of one image (.txt, .caption) say different things.
    """
    by_name = _by_lower_ending(texts)
    own = [_own(image, by_name) for image in images]
    wanted = sorted({text for found in own for text in found})
    with ThreadPoolExecutor(_THREADS) as pool:
        read = dict(zip(wanted, pool.map(lambda name: _read(root, name), wanted, chunksize=256), strict=True))
    captions = []
    for found in own:
        said = {read[text] for text in found}
        if len(said) > 1:
            other = next(text for text in found if read[text] != read[found[0]])
            raise UserError(
                f"data.path: {root / found[0]} and {root / other} hold different captions of one image; keep one"
            )
        captions.append(said.pop() if said else "")
    return tuple(captions), _remarks(root, len(wanted), sorted(set(texts) - set(wanted)))


def _by_lower_ending(texts: Collection[str]) -> dict[str, list[str]]:
    """The files of captions by their names with the ending in lower case: ``.TXT`` is one as ``.JPG`` is an image."""
    found: dict[str, list[str]] = {}
    for text in sorted(texts):
        stem, ending = os.path.splitext(text)
        found.setdefault(stem + ending.lower(), []).append(text)
    return found


def _own(image: str, by_name: dict[str, list[str]]) -> list[str]:
    """The files of captions of an image: its name with another ending, or with one more."""
    stem = os.path.splitext(image)[0]
    names = [name for ending in CAPTIONS for name in (stem + ending, image + ending)]
    return [text for name in names for text in by_name.get(name, ())]


def _read(root: Path, name: str) -> str:
    path = root / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.path: cannot read the caption {path} {why_unreadable(error, 'mend or remove it')}"
        ) from None
    return replace_surrogates(decode_text(data, f"data.path: the caption {path}")).strip()


def _remarks(root: Path, read: int, alone: Sequence[str]) -> tuple[str, ...]:
    found = []
    if read:
        found.append(f"data.path: captions of {root} are read from text files beside the images, {read} in all")
    if alone:
        found.append(
            f"data.path: text files below {root} that have no image beside them are left out, {len(alone)} in all "
            f"(first: {alone[0]})"
        )
    return tuple(found)
