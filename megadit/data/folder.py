"""``image-folder``: your own images, one sub-folder per class or a ``metadata.jsonl``, decoded when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from megadit.config.data import Crop
from megadit.config.json_text import JsonError, parse_json
from megadit.data.crop import read_image
from megadit.data.dataset import ImageSet, StoredFacts
from megadit.data.image_files import FORMATS
from megadit.data.labels import label_of, number_labels
from megadit.data.listing import Listing, sizes_of
from megadit.data.places import image_root
from megadit.errors import UserError
from megadit.text_files import decode

DEFAULT_SIZE = 256
EXTENSIONS = frozenset(FORMATS)
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class FolderSet:
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
    stores_latents: bool = False
    stored: StoredFacts | None = None
    mirrored: ImageSet | None = None
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> Path:
        """The file of image i."""
        return Path(self.root, self.files[i])

    def image(self, i: int) -> Tensor:
        return read_image(self.path(i), self.image_size, self.crop)

    def label(self, i: int) -> int:
        return self.labels[i]

    def caption(self, i: int) -> str:
        return self.captions[i]

    def extras(self, i: int) -> dict[str, Tensor]:
        return {}

    def null_extras(self) -> dict[str, Tensor]:
        return {}

    def listing(self) -> Listing:
        names, sizes = tuple(map(os.fsencode, self.files)), sizes_of(self.root, self.files)
        return Listing("image", names, sizes, np.array(self.labels, dtype=np.int64), self.captions)


def load_folder(
    path: str | None, image_size: int | None, *, labelled: bool, crop: Crop = "adm", num_classes: int | None = None
) -> FolderSet:
    """List the images under ``path``; no file is opened but ``metadata.jsonl``, which decides alone if it is there.

    ``labelled``: whether classes are wanted. Without them all images below ``path`` are taken.
    ``num_classes``: the model's, where it is known and all classes are meant.

    Raises ``UserError`` for a missing folder, no images, or a metadata line that cannot be used.
    """
    root = image_root(path)
    size = image_size or DEFAULT_SIZE
    if (root / METADATA).is_file():
        found = _from_metadata(root, size, labelled, num_classes)
    else:
        found = _from_classes(root, size) if labelled else _from_files(root, size)
    return replace(found, crop=crop)


def _from_classes(root: Path, size: int) -> FolderSet:
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _skipped(entry.name)))
    stray = next((e.name for e in sorted(os.scandir(root), key=lambda e: e.name) if _is_image(e.name)), None)
    if stray is not None:
        raise UserError(
            f"data.path: {root} has an image, {stray}, outside of any class; move images into one sub-folder per "
            f"class, add a {METADATA}, or set data.condition=none"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(classes):
        found = [f"{folder}/{name}" for name in _images_below(root / folder)]
        if not found:
            raise UserError(f"data.path: the class folder {root / folder} has no images; fill or remove it")
        files += found
        labels += [label] * len(found)
    if not files:
        raise UserError(f"data.path: {root} has no images; put them into one sub-folder per class, or add a {METADATA}")
    return FolderSet(
        root=str(root),
        image_size=size,
        classes=classes,
        files=tuple(files),
        labels=tuple(labels),
        captions=tuple(classes[label].replace("_", " ") for label in labels),
        bases=tuple(f"{classes[label]}/{_stem(name)}" for name, label in zip(files, labels, strict=True)),
    )


def _from_files(root: Path, size: int) -> FolderSet:
    files = tuple(_images_below(root))
    if not files:
        raise UserError(f"data.path: {root} has no images ({', '.join(sorted(EXTENSIONS))}); give another folder")
    return FolderSet(
        root=str(root),
        image_size=size,
        classes=(),
        files=files,
        labels=(0,) * len(files),
        captions=("",) * len(files),
        bases=tuple(_stem(name) for name in files),
    )


def _from_metadata(root: Path, size: int, labelled: bool, num_classes: int | None) -> FolderSet:
    numbered = list(_metadata_lines(root))
    lines = [entry for _, entry in numbered]
    if not lines:
        raise UserError(f"data.path: {root / METADATA} has no lines; give one JSON object per image")
    classes: tuple[str, ...] = ()
    labels = [0] * len(lines)
    if labelled:
        classes, labels = _number_labels(root, numbered, num_classes)
    files = tuple(entry["file_name"] for entry in lines)
    return FolderSet(
        root=str(root),
        image_size=size,
        classes=classes,
        files=files,
        labels=tuple(labels),
        captions=tuple(entry.get("caption", "") for entry in lines),
        bases=tuple(_stem(name) for name in files),
    )


def _number_labels(
    root: Path, lines: list[tuple[int, dict[str, Any]]], num_classes: int | None
) -> tuple[tuple[str, ...], list[int]]:
    def where(i: int) -> str:
        return f"line {lines[i][0]} of {root / METADATA}"

    without = [number for number, entry in lines if "label" not in entry]
    if without:
        raise UserError(
            f"data.path: {len(without)} of {len(lines)} lines of {root / METADATA} have no label, line {without[0]} "
            "first; add them, or set data.condition=none"
        )
    given = [label_of(entry["label"], where(i)) for i, (_, entry) in enumerate(lines)]
    return number_labels(given, where, num_classes)


def _metadata_lines(root: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The checked objects of ``metadata.jsonl`` by line: file_name, and optionally caption and label."""
    where = root / METADATA
    try:
        text = decode(where.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.path: cannot read {where} ({error}); it must be UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except JsonError as error:
            raise UserError(f"data.path: line {number} of {where} is not JSON ({error}); mend the line") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            raise UserError(f"data.path: line {number} of {where} has no file_name; name the image, relative to {root}")
        if not isinstance(entry.get("caption", ""), str):
            raise UserError(f"data.path: line {number} of {where}: caption must be a string, not {entry['caption']!r}")
        yield number, entry


def _images_below(folder: Path) -> list[str]:
    """Image files under ``folder``, relative to it, sorted; hidden folders and files are passed over."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _skipped(name)]
        relative = os.path.relpath(parent, folder)
        prefix = "" if relative == "." else PurePosixPath(Path(relative)).as_posix() + "/"
        found += [prefix + name for name in names if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return not _skipped(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def _skipped(name: str) -> bool:
    return name.startswith((".", "__"))


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
