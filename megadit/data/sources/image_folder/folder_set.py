"""``image-folder``: your own images, one sub-folder per class or a ``metadata.jsonl``, decoded when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from torch import Tensor

from megadit.config.schema.data import Crop, DataConfig
from megadit.data.dataset import PixelSet
from megadit.data.image_files import read_image
from megadit.data.listing import Listing, sizes_of
from megadit.data.sources.image_folder.metadata import METADATA, check_listed, read_metadata
from megadit.data.sources.image_folder.side_files import read_side_files
from megadit.data.sources.image_folder.tree import EXTENSIONS, Findings, entries, images_below, same_folders
from megadit.errors import UserError
from megadit.files.text import name_bytes, replace_surrogates

DEFAULT_SIZE = 256
# How the parts of a set are called where each has a folder of its own.
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
_SHOWN_KEYS = 8


@dataclass(frozen=True)
class FolderSet(PixelSet):
    """Image files under ``root``, each decoded and centre-cropped to ``image_size`` on access."""

    root: str
    image_size: int
    classes: tuple[str, ...]
    files: tuple[str, ...]  # relative to root, with forward slashes
    labels: tuple[int, ...]
    captions: tuple[str, ...]
    bases: tuple[str, ...]
    crop: Crop = "adm"
    name: str = "image-folder"
    channels: int = 3
    notice: str = ""
    remarks: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()  # of metadata.jsonl, where images come from it
    unread: tuple[str, ...] = ()  # keys of metadata.jsonl that nothing reads, or files in its place

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> Path:
        """The file of image i."""
        return Path(self.root, self.files[i])

    def source_of(self, i: int) -> str:
        told = f"line {self.lines[i]} of {Path(self.root, METADATA)}, {self.files[i]}" if self.lines else None
        return told or str(self.path(i))

    def check_files(self) -> None:
        """Whether the files that ``metadata.jsonl`` names are there. Raises UserError that names the first."""
        if self.lines:
            check_listed(Path(self.root), self.files, self.lines)

    def image(self, i: int) -> Tensor:
        return read_image(self.path(i), self.image_size, self.crop)

    def label(self, i: int) -> int:
        return self.labels[i]

    def caption(self, i: int) -> str:
        return self.captions[i]

    def listing(self) -> Listing:
        names, sizes = tuple(map(name_bytes, self.files)), sizes_of(self.root, self.files)
        return Listing("image", names, sizes, np.array(self.labels, dtype=np.int64), self.captions)


def load_folder(config: DataConfig, root: Path, num_classes: int | None) -> FolderSet:
    """List the images under ``root``. Of its files ``metadata.jsonl`` is opened, which decides alone if it is
    there, and files of captions.

    ``data.condition`` says whether classes or captions are wanted; without both all images below the folder are taken.
    ``num_classes``: the model's, where it is known and all classes are meant.

    Raises ``UserError`` for no images, folders that cannot be read, links that lead nowhere, or a
    metadata line that cannot be used.
    """
    size = config.image_size or DEFAULT_SIZE
    labelled, captioned = config.condition == "class", config.condition == "text"
    if os.path.lexists(root / METADATA):
        found = _from_metadata(root, size, labelled, captioned, num_classes)
    else:
        found = _from_classes(root, size) if labelled else _from_files(root, size, captioned)
    return replace(found, crop=config.crop)


def _from_classes(root: Path, size: int) -> FolderSet:
    found = Findings(root)
    classes, stray = entries(root, found)
    if stray:
        raise UserError(
            f"data.path: {root} has an image, {stray[0]}, outside of any class; move images into one sub-folder per "
            f"class, add a {METADATA}, or set data.condition=none"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        images = [f"{folder}/{name}" for name in images_below(root / folder, found, outside=(root,))]
        if not images:
            images_below(root / folder, lying := Findings(root / folder), outside=(root,))
            held = lying.held()
            remedy = f"make them {', '.join(sorted(EXTENSIONS))}, or remove it" if held else "fill or remove it"
            raise UserError(f"data.path: the class folder {root / folder} has no images{held}; {remedy}")
        files += images
        labels += [label] * len(images)
    if not files:
        raise UserError(
            f"data.path: {root} has no images{found.held()}; put them into one sub-folder per class, or add a "
            f"{METADATA}"
        )
    return FolderSet(
        root=str(root),
        image_size=size,
        classes=tuple(classes),
        files=tuple(files),
        labels=tuple(labels),
        captions=tuple(replace_surrogates(classes[label]).replace("_", " ") for label in labels),
        bases=tuple(f"{classes[label]}/{_stem(name)}" for name, label in zip(files, labels, strict=True)),
        remarks=(*found.remarks(), *_class_remarks(root, classes)),
    )


def _class_remarks(root: Path, classes: Sequence[str]) -> Iterator[str]:
    """What looks as if folders meant something else than classes."""
    for first, again in same_folders(root, classes):
        yield f"data.path: the classes {first} and {again} of {root} are one folder, whose images have both labels"
    yield from _split_remark(root, classes)


def _split_remark(root: Path, folders: Sequence[str]) -> Iterator[str]:
    splits = [name for name in folders if name.lower() in _SPLITS]
    if splits and len(splits) == len(folders):
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        yield (
            f"data.path: the folders of {root} are called {' and '.join(splits)}, as parts of a set are, and all of "
            f"them are read; for one alone give data.path={root / first}"
        )


def _from_files(root: Path, size: int, captioned: bool) -> FolderSet:
    found = Findings(root, texts=captioned)
    files = tuple(images_below(root, found))
    if not files:
        raise UserError(
            f"data.path: {root} has no images ({', '.join(sorted(EXTENSIONS))}){found.held()}; give another folder"
        )
    captions, told = read_side_files(root, files, found.captions) if captioned else (("",) * len(files), ())
    return FolderSet(
        root=str(root),
        image_size=size,
        classes=(),
        files=files,
        labels=(0,) * len(files),
        captions=captions,
        bases=tuple(_stem(name) for name in files),
        remarks=(*told, *found.remarks(), *_split_remark(root, sorted({name.partition("/")[0] for name in files}))),
        unread=found.tables(),
    )


def _from_metadata(root: Path, size: int, labelled: bool, captioned: bool, num_classes: int | None) -> FolderSet:
    lines = read_metadata(root, captioned=captioned)
    classes: tuple[str, ...] = ()
    labels = [0] * len(lines.files)
    if labelled:
        classes, labels = lines.number_labels(num_classes)
    return FolderSet(
        root=str(root),
        image_size=size,
        classes=classes,
        files=lines.files,
        labels=tuple(labels),
        captions=lines.captions,
        bases=tuple(_stem(name) for name in lines.files),
        remarks=lines.remarks,
        lines=lines.numbers,
        unread=lines.keys[:_SHOWN_KEYS],
    )


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
