"""The image files below a folder. Links are followed, and whatever is left out is counted for a remark."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megadit.data.image_files import FORMATS
from megadit.errors import UserError

EXTENSIONS = frozenset(FORMATS)
CAPTIONS = (".txt", ".caption")  # of files beside images that hold their captions
# What other programs put beside images to describe them, and is not read here.
_TABLES = frozenset(
    {"metadata.csv", "metadata.parquet", "metadata.json", "captions.txt", "captions.json", "captions.csv", "labels.csv"}
)
_TABLE_KINDS = frozenset({".parquet", ".arrow", ".tar", ".zip"})
_LOST = "lost+found"  # which a file system keeps in its first folder for itself, closed to all but root
_SHOWN = 5  # kinds of files in a sentence

_SENTENCES = {  # for one and for more of what was counted
    "other": (
        "file BELOW is no image that is read here and is left out",
        "files BELOW are no images that are read here and are left out",
    ),
    "hidden": (
        "image or folder BELOW is left out, since its name begins with . or __",
        "images and folders BELOW are left out, since their names begin with . or __",
    ),
    "again": (
        "link BELOW leads to a folder that is listed by another path and is not followed",
        "links BELOW lead to folders that are listed by another path and are not followed",
    ),
    "around": (
        "link BELOW leads to a folder in which it lies and is not followed",
        "links BELOW lead to folders in which they lie and are not followed",
    ),
    "dangling": ("link BELOW leads nowhere and is left out", "links BELOW lead nowhere and are left out"),
}

_Key = tuple[int, int]  # st_dev, st_ino: what a folder is, by whatever path


@dataclass
class SkippedFiles:
    """The files below ``root`` that are no images, counted by reason, with the first path of each for its remark.

    texts: whether caption files are read, whose paths ``captions`` then holds.
    """

    root: Path
    texts: bool = False
    captions: set[str] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)  # extensions of the files that are no images
    _first: dict[str, str] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)

    def below(self, path: str) -> str:
        """``path`` relative to the root."""
        return path.removeprefix(str(self.root)).lstrip("/")

    def note(self, reason: str, path: str) -> None:
        """Count a path, relative to ``root``, under a key of ``_SENTENCES``."""
        self._counts[reason] += 1
        self._first[reason] = min(path, self._first.get(reason, path))

    def other(self, path: str) -> None:
        """Count a file that is no image."""
        name = os.path.basename(path)
        extension = os.path.splitext(name)[1].lower()
        if self.texts and extension in CAPTIONS and name.lower() not in _TABLES:
            self.captions.add(path)
        elif name.lower() in _TABLES or name == "metadata.jsonl":  # in a sub-folder; that of root itself is read
            self.note("table", path)
        else:
            self.kinds[extension] += 1
            self.note("other", path)

    def contents(self) -> str:
        """ "; it holds 10 .avif": the end of a message that there are no images; empty for an empty folder."""
        kinds = _kinds(self.kinds + Counter({"metadata files": self._counts["table"]}))
        if not kinds:
            return ""
        packed = " (tars are read by data.name=webdataset; unpack other archives and tables into image files)"
        return f"; it holds {kinds}{packed if _TABLE_KINDS & set(self.kinds) else ''}"

    def tables(self) -> tuple[str, ...]:
        """The first of the metadata files that are not read; empty if there are none."""
        return (self._first["table"],) if self._counts["table"] else ()

    def remarks(self) -> tuple[str, ...]:
        """A sentence for each reason for which files are left out."""
        remarks = []
        for reason, (one, many) in _SENTENCES.items():
            if count := self._counts[reason]:
                sentence = (one if count == 1 else many).replace("BELOW", f"below {self.root}")
                kinds = f"{_kinds(self.kinds)}; " if reason == "other" else ""
                remarks.append(f"data.path: {count} {sentence} ({kinds}first: {self._first[reason]})")
        for first in self.tables():
            where = f", or give data.path={self.root / Path(first).parent}" if first.endswith("/metadata.jsonl") else ""
            remarks.append(
                f"data.path: {self.root / first} is not read; labels and captions come from a metadata.jsonl in "
                f"{self.root}, one JSON object per image{where}"
            )
        return tuple(remarks)


def images_below(folder: Path, skipped: SkippedFiles, outside: Iterable[Path] = ()) -> list[str]:
    """Image files under ``folder``, relative to it, sorted. Links to folders are followed after its own sub-folders,
    and each folder is listed once; what is left out is counted in ``skipped``.

    ``outside``: folders that contain it. Links to these, or to folders that contain them, are not followed.

    Raises UserError for a folder that cannot be read, and for a link or device in the place of an image.
    """
    outside = tuple(outside)
    around = {_key(parent) for path in (folder, *outside) for parent in path.resolve().parents}
    around |= {_key(path) for path in outside}
    if _key(folder) in around:
        raise UserError(f"data.path: {folder} is a link to a folder in which it lies; remove it")
    images: list[str] = []
    links = [""]  # the folder itself, then the links in it, then the links in these
    visited: set[_Key] = set()
    while links:
        batch, links = sorted(links), []
        for link in batch:
            if _key(folder / link) in around:  # else the neighbours of the set would become a part of it
                skipped.note("around", skipped.below(f"{folder}/{link}"))
            else:
                _walk(folder, link, skipped, images, links, visited)
    return sorted(images)


def entries(folder: Path, skipped: SkippedFiles) -> tuple[list[str], list[str]]:
    """(sub-folders and links to folders, images) of ``folder`` itself, sorted. Raises UserError as ``images_below``."""
    folders: list[str] = []
    images: list[str] = []
    for name, kind in _scan(str(folder), skipped):
        if kind != "other":
            (images if kind == "image" else folders).append(name)
    return sorted(folders), sorted(images)


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return not _skipped(name) and os.path.splitext(name)[1].lower() in EXTENSIONS


def same_folders(folder: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names in ``folder`` that are one and the same folder."""
    first: dict[_Key, str] = {}
    return [(first[key], name) for name in names if first.setdefault(key := _key(folder / name), name) != name]


def _walk(
    folder: Path, start: str, skipped: SkippedFiles, images: list[str], links: list[str], visited: set[_Key]
) -> None:
    """Add the images below ``folder/start``, a link unless empty, to ``images``, and links to folders to ``links``."""
    pending = [f"{start}/" if start else ""]
    while pending:
        prefix = pending.pop()
        path = f"{folder}/{prefix}".rstrip("/")
        key = _key(path)
        if start and key in visited:
            skipped.note("again", skipped.below(path))
            continue
        visited.add(key)
        for name, kind in _scan(path, skipped):
            if kind == "image":
                images.append(prefix + name)
            elif kind == "link":
                links.append(prefix + name)
            elif kind == "folder":
                pending.append(f"{prefix}{name}/")


def _scan(folder: str, skipped: SkippedFiles) -> Iterator[tuple[str, str]]:
    """(name, "folder" | "link" | "image" | "other") of the entries of ``folder``; hidden names are only counted."""
    try:
        with os.scandir(folder) as scanned:
            listed = list(scanned)
    except OSError as error:
        raise UserError(
            f"data.path: the folder {folder} cannot be read ({error.strerror or error}); give yourself the right to "
            "read it, or take it away"
        ) from None
    for entry in listed:
        kind = _kind(entry)
        if entry.name == _LOST:
            continue
        if _skipped(entry.name):
            hidden = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            if kind in ("folder", "link") or hidden:
                skipped.note("hidden", skipped.below(entry.path))
            continue
        if kind in ("dangling", "special"):
            _check_special(entry, kind, skipped)
            continue
        if kind == "other":
            skipped.other(skipped.below(entry.path))
        yield entry.name, kind


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "link" if entry.is_symlink() else "folder"
        if entry.is_file():
            return "image" if is_image(entry.name) else "other"
    except OSError:  # links in a circle
        return "dangling"
    return "dangling" if entry.is_symlink() and not os.path.exists(entry.path) else "special"


def _check_special(entry: os.DirEntry[str], kind: str, skipped: SkippedFiles) -> None:
    """Count a dangling link or a special file. Raises UserError where it stands for an image or a folder."""
    extension = os.path.splitext(entry.name)[1].lower()
    if kind == "special":
        if extension in EXTENSIONS:
            raise UserError(f"data.path: {entry.path} is no regular file (a pipe, a socket or a device); take it away")
        skipped.other(skipped.below(entry.path))
        return
    if extension in EXTENSIONS or not extension:
        raise UserError(
            f"data.path: {entry.path} is a link to {os.readlink(entry.path)!r}, which is not there; restore what it "
            "leads to (a disk that is not mounted?), or remove the link"
        )
    skipped.note("dangling", skipped.below(entry.path))


def _key(path: str | Path) -> _Key:
    try:
        facts = os.stat(path)
    except OSError as error:
        raise UserError(f"data.path: the folder {path} cannot be read ({error.strerror or error})") from None
    return facts.st_dev, facts.st_ino


def _skipped(name: str) -> bool:
    return name.startswith((".", "__"))


def _kinds(kinds: Counter[str]) -> str:
    """ "10 .avif, 2 without an extension" """
    order = sorted((-count, kind) for kind, count in kinds.items() if count)
    parts = [f"{-count} {kind or 'without an extension'}" for count, kind in order[:_SHOWN]]
    return ", ".join([*parts, *([f"{len(order) - _SHOWN} kinds more"] if len(order) > _SHOWN else [])])
