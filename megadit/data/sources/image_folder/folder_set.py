"""``image-folder``: your own images, one sub-folder per class or a ``metadata.jsonl``, decoded on access."""

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
from megadit.data.sources.image_folder.tree import EXTENSIONS, SkippedFiles, entries, images_below, same_folders
from megadit.errors import UserError
from megadit.files.text import name_bytes, replace_surrogates

DEFAULT_SIZE = 256
# Names of folders that hold the parts of a set.
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
_SHOWN_KEYS = 8


@dataclass(frozen=True)
class FolderSet(PixelSet):
    """Image files under ``root``, each decoded and centre-cropped to ``image_size`` on access."""

    root: str
    files: tuple[str, ...]  # relative to root, with forward slashes
    labels: tuple[int, ...]
    captions: tuple[str, ...]
    bases: tuple[str, ...]
    classes: tuple[str, ...] = ()
    image_size: int = DEFAULT_SIZE
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
        if not self.lines:
            return str(self.path(i))
        return f"line {self.lines[i]} of {Path(self.root, METADATA)}, {self.files[i]}"

    def check_files(self) -> None:
        """Raise UserError where files that ``metadata.jsonl`` names do not exist."""
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
    """List the images under ``root``: those that its ``metadata.jsonl`` names, or all image files.

    ``data.condition`` decides whether sub-folders are classes, and whether captions are read.
    ``num_classes``: the model's; None: not known, or only some classes are used.

    Raises ``UserError`` for no images, folders that cannot be read, links that lead nowhere, or a
    metadata line that cannot be used.
    """
    labelled, captioned = config.condition == "class", config.condition == "text"
    if os.path.lexists(root / METADATA):
        images = _from_metadata(root, labelled, captioned, num_classes)
    else:
        images = _from_classes(root) if labelled else _from_files(root, captioned)
    return replace(images, image_size=config.image_size or DEFAULT_SIZE, crop=config.crop)


def _from_classes(root: Path) -> FolderSet:
    skipped = SkippedFiles(root)
    classes, stray = entries(root, skipped)
    if stray:
        raise UserError(
            f"data.path: {root} has an image, {stray[0]}, outside of any class; move images into one sub-folder per "
            f"class, add a {METADATA}, or set data.condition=none"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        images = [f"{folder}/{name}" for name in images_below(root / folder, skipped, outside=(root,))]
        if not images:
            images_below(root / folder, in_folder := SkippedFiles(root / folder), outside=(root,))
            contents = in_folder.contents()
            remedy = f"make them {', '.join(sorted(EXTENSIONS))}, or remove it" if contents else "fill or remove it"
            raise UserError(f"data.path: the class folder {root / folder} has no images{contents}; {remedy}")
        files += images
        labels += [label] * len(images)
    if not files:
        raise UserError(
            f"data.path: {root} has no images{skipped.contents()}; put them into one sub-folder per class, or add a "
            f"{METADATA}"
        )
    return FolderSet(
        root=str(root),
        classes=tuple(classes),
        files=tuple(files),
        labels=tuple(labels),
        captions=tuple(replace_surrogates(classes[label]).replace("_", " ") for label in labels),
        bases=tuple(f"{classes[label]}/{_stem(name)}" for name, label in zip(files, labels, strict=True)),
        remarks=(*skipped.remarks(), *_class_remarks(root, classes)),
    )


def _class_remarks(root: Path, classes: Sequence[str]) -> Iterator[str]:
    """Remarks on folders that may be something else than classes."""
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


def _from_files(root: Path, captioned: bool) -> FolderSet:
    skipped = SkippedFiles(root, texts=captioned)
    files = tuple(images_below(root, skipped))
    if not files:
        kinds = ", ".join(sorted(EXTENSIONS))
        raise UserError(f"data.path: {root} has no images ({kinds}){skipped.contents()}; give another folder")
    captions, remarks = read_side_files(root, files, skipped.captions) if captioned else (("",) * len(files), ())
    folders = sorted({name.partition("/")[0] for name in files})
    return FolderSet(
        root=str(root),
        files=files,
        labels=(0,) * len(files),
        captions=captions,
        bases=tuple(_stem(name) for name in files),
        remarks=(*remarks, *skipped.remarks(), *_split_remark(root, folders)),
        unread=skipped.tables(),
    )


def _from_metadata(root: Path, labelled: bool, captioned: bool, num_classes: int | None) -> FolderSet:
    metadata = read_metadata(root, captioned=captioned)
    no_labels: tuple[tuple[str, ...], list[int]] = ((), [0] * len(metadata.files))
    classes, labels = metadata.number_labels(num_classes) if labelled else no_labels
    return FolderSet(
        root=str(root),
        classes=classes,
        files=metadata.files,
        labels=tuple(labels),
        captions=metadata.captions,
        bases=tuple(_stem(name) for name in metadata.files),
        remarks=metadata.remarks,
        lines=metadata.numbers,
        unread=metadata.keys[:_SHOWN_KEYS],
    )


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
