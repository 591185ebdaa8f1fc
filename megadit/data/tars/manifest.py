"""``manifest.json`` of a set of tars: what it holds, how it was made, and what every tar must weigh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from megadit.config.json_fields import shown
from megadit.config.json_text import parse_json
from megadit.data.dataset import StoredFacts
from megadit.data.tars.handles import ShardFile
from megadit.data.tars.layout import INDEX, MANIFEST
from megadit.errors import UserError
from megadit.files import whole_file
from megadit.text_files import json_bytes

_FORMAT, _VERSION = "megadit tars", 1
_TYPES: dict[str, Any] = {"int": int, "float": int | float, "bool": bool, "str": str, "dict[str, Any]": dict}
_T = TypeVar("_T")


@dataclass(frozen=True)
class ShardFacts:
    """One tar as it was written."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished set. name: of the set it was made from, by whose name the split into parts goes.

    made: the settings of the command that wrote it, for people.
    """

    name: str
    samples: int
    classes: tuple[str, ...]
    channels: int
    image_size: int
    notice: str
    shards: tuple[ShardFacts, ...]
    stored: StoredFacts | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> dict[str, Any]:
        """The data section that the set was written by, as far as ``made`` has it."""
        data = self.made.get("data")
        return data if isinstance(data, dict) else {}

    def number(self, file: str) -> int | None:
        """The place of a tar among the shards; None if it is not one of them."""
        return next((n for n, shard in enumerate(self.shards) if shard.file == file), None)


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``; with it the set is complete."""
    values = {"format": _FORMAT, "version": _VERSION, "index": INDEX, **asdict(manifest)}
    with whole_file(folder / MANIFEST) as temporary:
        temporary.write_bytes(json_bytes(json.dumps(values, indent=1, ensure_ascii=False) + "\n"))


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none. Raises UserError if it cannot be read."""
    path = folder / MANIFEST
    try:
        values = parse_json(path.read_bytes())
        if values.pop("format") != _FORMAT:
            raise ValueError("it is none of megadit's tars")
        version = values.pop("version")
        if version != _VERSION:
            raise ValueError(f"its version is {version}, this megadit reads {_VERSION}")
        del values["index"]
        shards = tuple(_typed(ShardFacts, shard) for shard in _listed(values, "shards", dict))
        stored = values.pop("stored")
        classes = tuple(_listed(values, "classes", str))
        return replace(
            _typed(Manifest, {**values, "shards": shards, "classes": classes, "stored": None}),
            stored=None if stored is None else _typed(StoredFacts, stored),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.path: {path} cannot be read ({' '.join(str(error).split())}); copy it again, or remove it if these "
            "are other people's tars"
        ) from error


def _listed(values: dict[str, Any], key: str, kind: type) -> list[Any]:
    items = values.pop(key)
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise ValueError(f"{key} is not what it lists")
    return items


def _typed(kind: type[_T], values: dict[str, Any]) -> _T:
    """A dataclass from JSON. Raises ValueError or TypeError for a value that is not of its field's type."""
    for own in fields(kind):  # type: ignore[arg-type]
        wanted, value = _TYPES.get(str(own.type)), values.get(own.name)
        if wanted is None or own.name not in values:
            continue
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise ValueError(f"{own.name} is {shown(value)}")
        if isinstance(value, int | float) and not 0 <= abs(value) < 2**63:
            raise ValueError(f"{own.name} is {shown(value)}")
    found = kind(**values)
    if isinstance(found, ShardFacts) and ("/" in found.file or found.file in ("", ".", "..") or found.bytes < 0):
        raise ValueError(f"it names {shown(found.file)}, which is no tar beside it")
    return found


def check_sizes(manifest: Manifest, folder: Path, numbers: Sequence[int]) -> list[ShardFile]:
    """The tars ``numbers`` of a manifest, each there and as long as it was written.

    Raises UserError that names the first tar that is not.
    """
    found = []
    for number in numbers:
        facts = manifest.shards[number]
        path = folder / facts.file
        try:
            shard = ShardFile.of(path)
        except OSError as error:
            raise UserError(
                f"data.path: {path} of {folder / MANIFEST} cannot be read ({error.strerror or error}); copy it there, "
                "or name the shards that you have by a pattern"
            ) from None
        if shard.size != facts.bytes:
            raise UserError(
                f"data.path: {path} has {shard.size} bytes, but {facts.bytes} were written ({MANIFEST}); copy it again"
            )
        found.append(shard)
    return found


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
