"""Captions in text files beside the images, as kohya's scripts read them: ``0001.png`` and ``0001.txt``."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megadit.data.sources.image_folder.metadata import read_text_file
from megadit.data.sources.image_folder.tree import CAPTIONS
from megadit.errors import UserError
from megadit.files.text import replace_surrogates

_THREADS = 16  # a network file system answers many requests at once


def read_side_files(
    root: Path, images: Sequence[str], texts: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(a caption per image, empty where it has no file, remarks). texts: the caption files below ``root``.

    Raises UserError for a file that is not text, and where two of one image (.txt, .caption) differ.
    """
    files = _files_of_images(images, texts)
    read = sorted(set(itertools.chain(*files)))
    with ThreadPoolExecutor(_THREADS) as pool:
        content = dict(zip(read, pool.map(lambda name: _read(root / name), read, chunksize=256), strict=True))
    captions = []
    for of_image in files:
        different = {content[file]: file for file in reversed(of_image)}
        if len(different) > 1:
            other = next(file for file in of_image if content[file] != content[of_image[0]])
            raise UserError(
                f"data.path: {root / of_image[0]} and {root / other} hold different captions of one image; keep one"
            )
        captions.append(next(iter(different), ""))
    return tuple(captions), tuple(_remarks(root, len(read), sorted(set(texts) - set(read))))


def _files_of_images(images: Sequence[str], texts: Collection[str]) -> list[list[str]]:
    """The caption files of each image: its name with another ending, or one more, in upper or lower case."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for text in sorted(texts):
        stem, ending = os.path.splitext(text)
        by_name[stem + ending.lower()].append(text)
    names = ([name + ending for ending in CAPTIONS for name in (os.path.splitext(i)[0], i)] for i in images)
    return [[text for name in of_image if name in by_name for text in by_name[name]] for of_image in names]


def _read(path: Path) -> str:
    return replace_surrogates(read_text_file(path, f"the caption {path}")).strip()


def _remarks(root: Path, read: int, alone: Sequence[str]) -> Iterator[str]:
    if read:
        yield f"data.path: captions of {root} are read from text files beside the images, {read} in all"
    if alone:
        yield (
            f"data.path: text files below {root} that have no image beside them are left out, {len(alone)} in all "
            f"(first: {alone[0]})"
        )
