"""``manifest.json`` of a set of tars: what it holds, how it was made, and size and checksum of every tar."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from megadit.data.dataset import StoredFacts
from megadit.data.shards.naming import INDEX, MANIFEST
from megadit.data.shards.shard_files import ShardFile
from megadit.errors import UserError
from megadit.files.json_fields import Fields, shown
from megadit.files.paths import atomic_write, is_file_name
from megadit.files.text import json_bytes

_FORMAT, _VERSION = "megadit tars", 1


@dataclass(frozen=True)
class ShardFacts:
    """One tar as it was written."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished set. name: of the set it was made from, on which the train/validation split depends.

    made: the settings of the command that wrote it.
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
        """The data section of ``made``; {} where there is none."""
        data = self.made.get("data")
        return data if isinstance(data, dict) else {}


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``, which completes the set."""
    values = {"format": _FORMAT, "version": _VERSION, "index": INDEX, **asdict(manifest)}
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_bytes(json_bytes(json.dumps(values, indent=1, ensure_ascii=False) + "\n"))


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none.

    Raises:
        UserError: it cannot be read, a value is not of its type, or a tar that it names lies outside of the folder.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        fields = Fields.of_file(path, "data.path")
        if fields.raw("format") != _FORMAT:
            raise UserError(
                f"data.path: '{path}' has format {shown(fields.raw('format'))} and not {_FORMAT}; copy it again"
            )
        version = fields.integer("version")
        if version != _VERSION:
            raise UserError(
                f"data.path: '{path}': its version is {version}, this megadit reads {_VERSION}; use the one that "
                "wrote it"
            )
        return _manifest(fields)
    except UserError as error:
        raise UserError(f"{error}, or remove it if these are other people's tars") from error


def _manifest(fields: Fields) -> Manifest:
    """The manifest in its file. Raises UserError."""
    shards, classes = fields.elements("shards"), fields.elements("classes")
    stored = fields.section("stored", null=True) if fields.raw("stored") is not None else None
    return Manifest(
        name=fields.text("name"),
        samples=fields.integer("samples"),
        classes=tuple(classes.text(key) for key in classes.names()),
        channels=fields.integer("channels", least=1),
        image_size=fields.integer("image_size"),
        notice=fields.text("notice"),
        shards=tuple(_shard(shards, key) for key in shards.names()),
        stored=None if stored is None else _stored(stored),
        made=dict(fields.section("made", {}).values()),
    )


def _shard(shards: Fields, key: str) -> ShardFacts:
    fields = shards.section(key)
    file = fields.text("file")
    if not is_file_name(file):
        raise fields.refused("file", file, f"the name of a tar beside {MANIFEST}")
    return ShardFacts(file, fields.integer("samples"), fields.integer("bytes"), fields.text("sha256"))


def _stored(fields: Fields) -> StoredFacts:
    """The stored facts, each of the type of its default. Raises UserError for keys of a newer megadit."""
    readers = {bool: Fields.flag, int: Fields.integer, float: Fields.number, str: Fields.text}
    defaults = {field.name: field.default for field in dataclass_fields(StoredFacts)}
    unknown = [key for key in fields.names() if key not in defaults]
    if unknown:
        raise UserError(f"{fields.where} has {unknown[0]}, which is not known here; use the megadit that wrote it")
    values: dict[str, Any] = {
        key: readers[type(default)](fields, key, default)  # type: ignore[operator]
        for key, default in defaults.items()
    }
    return StoredFacts(**values)


def check_sizes(manifest: Manifest, folder: Path, numbers: Sequence[int]) -> list[ShardFile]:
    """The tars ``numbers`` of a manifest, each there and as long as it was written.

    Raises UserError that names the first tar that is not.
    """
    files = []
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
        files.append(shard)
    return files


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
