"""``metadata.jsonl`` of a folder of images: one JSON object per image, with file name, caption and label."""

from __future__ import annotations

import os
import stat
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from megadit.data.labels import label_of, number_labels
from megadit.data.listing import MISSING, sizes_of
from megadit.errors import UserError, why_unreadable
from megadit.files.json_text import JsonError, parse_json
from megadit.files.text import decode_text, replace_surrogates, split_lines

METADATA = "metadata.jsonl"
_SHOWN_KEYS = 8
_READ = {"file_name", "caption", "text", "label"}


@dataclass(frozen=True)
class ImageMetadata:
    """The columns of a ``metadata.jsonl``, with a value per line.

    path: of the file.  numbers: of the lines in it.  labels: as they are written, ``_ABSENT`` where a line has none.
    keys: those that are not read, the most frequent first.
    """

    path: str
    numbers: tuple[int, ...]
    files: tuple[str, ...]
    captions: tuple[str, ...]
    labels: tuple[Any, ...]
    keys: tuple[str, ...]
    remarks: tuple[str, ...]

    def where(self, i: int) -> str:
        """Line i, for messages."""
        return f"line {self.numbers[i]} of {self.path}"

    def number_labels(self, num_classes: int | None) -> tuple[tuple[str, ...], list[int]]:
        """(classes, a class index per line). Raises UserError that names the first line without a valid label."""
        unlabelled = [i for i, label in enumerate(self.labels) if label is _ABSENT]
        if unlabelled:
            others = f" (what else they have: {', '.join(self.keys[:_SHOWN_KEYS])})" if self.keys else ""
            raise UserError(
                f"data.path: {len(unlabelled)} of {len(self.files)} lines of {self.path} have no label, line "
                f"{self.numbers[unlabelled[0]]} first{others}; add them, or set data.condition=none"
            )
        labels = [label_of(label, self.where(i)) for i, label in enumerate(self.labels)]
        return number_labels(labels, self.where, num_classes)


_ABSENT = object()  # in the place of a label


def read_metadata(root: Path, *, captioned: bool) -> ImageMetadata:
    """The lines of ``metadata.jsonl`` in ``root``: file_name, and optionally caption (or text) and label.

    ``captioned``: the model reads captions, so that a line with two different ones is refused.

    Raises UserError that names the first line that cannot be used.
    """
    file = root / METADATA
    path = str(file)  # once, for millions of lines
    numbers, files, captions, labels = [], [], [], []
    keys: Counter[str] = Counter()
    by_text: list[int] = []
    for number, values in _objects(file):
        where = f"line {number} of {path}"
        files.append(_file_name(values, root, where))
        caption, key = _caption(values, where, captioned)
        if key == "text":
            by_text.append(number)
        numbers.append(number)
        captions.append(replace_surrogates(caption))
        labels.append(values.get("label", _ABSENT))
        if not values.keys() <= _READ:
            keys.update(key for key in values if key not in _READ)
    if not files:
        raise UserError(f"data.path: {file} has no lines; give one JSON object per image")
    return ImageMetadata(
        path, tuple(numbers), tuple(files), tuple(captions), tuple(labels), tuple(key for key, _ in keys.most_common()),
        _remarks(file, numbers, files, by_text if captioned else []),
    )  # fmt: skip


def check_listed(root: Path, files: Sequence[str], numbers: Sequence[int]) -> None:
    """Raise UserError where files that the lines ``numbers`` of a metadata.jsonl name do not exist.

    It counts them, and names the first with its line and a file that may be the right one.
    """
    sizes = sizes_of(str(root), files)
    missing = [i for i, size in enumerate(sizes) if size == MISSING]
    if not missing:
        return
    first = missing[0]
    count = f"; {len(missing)} of {len(sizes)} files are missing" if len(missing) > 1 else ""
    raise UserError(
        f"data.path: line {numbers[first]} of {root / METADATA} names {files[first]}, which is not there"
        f"{_remedy(root, files[first])}{count}"
    )


def _objects(where: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values) of the lines that are not empty."""
    for number, line in enumerate(split_lines(read_text_file(where, str(where))), start=1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except JsonError as error:
            is_list = number == 1 and line.lstrip()[:1] == "["
            remedy = "if it is one list, write its objects one a line" if is_list else "mend the line"
            reason = str(error).removesuffix(" (line 1)")
            raise UserError(f"data.path: line {number} of {where} is not JSON ({reason}); {remedy}") from None
        if not isinstance(entry, dict):
            raise UserError(f"data.path: line {number} of {where} has no file_name: it is no JSON object; write one")
        yield number, entry


def read_text_file(path: Path, name: str) -> str:
    """The text of a file, called ``name`` in messages. Raises UserError where it cannot be read or is no text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.path: cannot read {name} {why_unreadable(error, 'mend or remove it')}") from None
    return decode_text(data, f"data.path: {name}")


def _file_name(entry: dict[str, Any], root: Path, where: str) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        other = next((key for key in entry if _names_a_file(key)), None)
        hint = "" if "file_name" in entry or other is None else f", but {other}: call it file_name"
        value = "" if "file_name" not in entry else f" but {str(name)[:60]!r}"
        raise UserError(f"data.path: {where} has no file_name{value}{hint}; name the image, relative to {root}")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        name_shown = name.encode("ascii", "backslashreplace").decode()
        raise UserError(
            f"data.path: {where}: file_name {name_shown} holds half a surrogate pair, which no name of a file does; "
            "correct it"
        ) from None
    if "\0" in name:
        raise UserError(f"data.path: {where}: file_name {name!r} holds a NUL, which no name of a file does; correct it")
    if name.startswith("/") or ".." in name:
        return _inside(name, root, where)
    return name


def _inside(name: str, root: Path, where: str) -> str:
    """``name`` relative to ``root``. Raises UserError where it leads out of it."""
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if path == base or not path.startswith(base.rstrip("/") + "/"):
        raise UserError(
            f"data.path: {where}: file_name {name} leads out of {root}; name files below it, or link the folder that "
            "holds them into it (ln -s)"
        )
    return os.path.relpath(path, base) if name.startswith("/") else name


def _names_a_file(key: str) -> bool:
    folded = key.lower().replace("_", "").replace("-", "")
    return folded in ("image", "img", "file", "path", "images") or folded.endswith(("filename", "filenames", "path"))


def _caption(entry: dict[str, Any], where: str, captioned: bool) -> tuple[str, str]:
    """(caption, its key): ``caption``, or else ``text``, as Hugging Face's data sets call it."""
    caption, text = entry.get("caption"), entry.get("text")
    if caption is None:
        if isinstance(text, str):
            return text, "text"
        if text is not None and captioned:
            raise UserError(f"data.path: {where}: text must be a string, not {str(text)[:60]!r}; write one caption")
        return "", ""
    if not isinstance(caption, str):
        raise UserError(f"data.path: {where}: caption must be a string, not {str(caption)[:60]}; write one caption")
    if captioned and isinstance(text, str) and text != caption:
        raise UserError(
            f"data.path: {where} has a caption, {caption[:60]!r}, and another text, {text[:60]!r}; keep one of the two "
            "keys, caption or text"
        )
    return caption, "caption"


def _remarks(where: Path, numbers: Sequence[int], files: Sequence[str], by_text: Sequence[int]) -> tuple[str, ...]:
    remarks = []
    if by_text:
        remarks.append(
            f"data.path: {len(by_text)} of {len(files)} lines of {where} have their caption under text, which is read "
            f"(line {by_text[0]} first)"
        )
    seen: set[str] = set()
    repeated = []
    for i, name in enumerate(files):
        if name in seen:
            repeated.append(i)
        seen.add(name)
    if repeated:
        remarks.append(
            f"data.path: {len(repeated)} of {len(files)} lines of {where} name a file that an earlier one names (line "
            f"{numbers[repeated[0]]}, {files[repeated[0]]}, first); each is an image of its own"
        )
    return tuple(remarks)


def _remedy(root: Path, name: str) -> str:
    """The remedy for a file that does not exist: another name that does, or the cause."""
    path = root / name
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return ": it is a folder; name a file"
    except FileNotFoundError:
        if os.path.islink(path):
            return f": it is a link to {os.readlink(path)!r}, which is not; restore what it leads to"
    except OSError as error:
        return f" ({error.strerror or error}); mend that, or take the line out"
    candidates = {
        "/".join(PureWindowsPath(name).parts): r"write / for \ in names",
        urllib.parse.unquote(name): "write names as they are, without percent signs",
        unicodedata.normalize("NFC", name): "its accents are composed otherwise (NFC, NFD)",
        unicodedata.normalize("NFD", name): "its accents are composed otherwise (NFC, NFD)",
        PureWindowsPath(name).name: "names are relative to data.path",
    }
    for other, why in candidates.items():
        if other != name and "\0" not in other and (root / other).is_file():
            return f", but {other} is: {why}"
    try:
        beside = os.listdir(path.parent)
    except OSError:
        return f" (nor is the folder {path.parent}); copy it there, or take the line out"
    near = next((other for other in sorted(beside) if other.casefold() == path.name.casefold()), None)
    stem = next((other for other in sorted(beside) if os.path.splitext(other)[0] == path.name), None)
    if near or stem:
        return f", but {near or stem} is: write the name as it is, {'capitals' if near else 'extension'} too"
    return "; copy it there, or take the line out"
