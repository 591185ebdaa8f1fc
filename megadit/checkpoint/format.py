"""What a checkpoint is made of: positions, the index and its checksums. See docs/checkpoints.md.

``checkpoints/step-XXXXXXXX/`` holds one safetensors file per writing rank, ``state.json`` (step, counters, loss
scale, group table, config) and ``index.json``: which file holds which index range of which parameter, its checksums,
and the sizes of all files. Nothing in it depends on the number of ranks or on the ZeRO stage.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megadit.checkpoint.fields import check_index, told
from megadit.checkpoint.io import BLOCK, BrokenCheckpoint, FileRecord, Piece
from megadit.checkpoint.names import INDEX
from megadit.engine.deepspeed.partitions import Fragment
from megadit.errors import UserError

FORMAT = "megadit-checkpoint"
VERSION = 2  # 1 had neither checksums nor sizes
WEIGHTS = "weights"


@dataclass(frozen=True)
class Position:
    """Where a run stands: completed optimizer steps, images drawn, updates skipped for overflow."""

    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0


class StateSource(Protocol):
    """State that follows the master weights fragment by fragment, such as moving averages of them."""

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """Writable 1-D float32 views of the fragment's values by kind (``ema/0.9999``)."""
        ...


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says. ``files`` is empty and pieces have no checksums in version 1."""

    parameters: dict[str, list[int]]
    pieces: list[Piece]
    files: dict[str, FileRecord]
    block: int = BLOCK
    version: int = VERSION

    def to_json(self) -> str:
        """The file's text; its last key is the checksum of the others."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "block": self.block,
            "files": {name: asdict(record) for name, record in self.files.items()},
            "parameters": self.parameters,
            "pieces": [piece.to_json() for piece in self.pieces],
        }
        return json.dumps({**body, "crc32": _sum_of(body)})

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read a checkpoint's index.

        Raises:
            BrokenCheckpoint: it is not there, torn or changed.
            UserError: it is of a newer megadit, or of another program.
        """
        try:
            body = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            name, version = body.get("format"), body.get("version")
            if name == FORMAT and version == 1:
                check_index(body)
                return cls(body["parameters"], [Piece.from_json(piece) for piece in body["pieces"]], {}, version=1)
            if name == FORMAT and version == VERSION:
                expected = body.pop("crc32")
                if expected != _sum_of(body):
                    raise ValueError("its checksum is wrong")
                check_index(body)
                files = {key: FileRecord(**record) for key, record in body["files"].items()}
                pieces = [Piece.from_json(piece) for piece in body["pieces"]]
                return cls(body["parameters"], pieces, files, body["block"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BrokenCheckpoint(
                f"checkpoint {folder}: its index cannot be read ({told(error, folder / INDEX)}); use an earlier one"
            ) from error
        raise UserError(
            f"checkpoint {folder}: format {name} version {version} is not {FORMAT} version 1 to {VERSION}; "
            "use the megadit that wrote it"
        )


def _sum_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def write_text(path: Path, text: str) -> FileRecord:
    """Write a file so that after a crash there is the old one or the whole new one; its record for the index."""
    data = text.encode()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return FileRecord(len(data), zlib.crc32(data))


def flush_folder(path: Path) -> None:
    """Make the names in a folder survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_disk_errors(target: Path, action: Callable[[], Any]) -> Any:
    """``action()``, its OSError told as what the disk does not take.

    Raises:
        UserError: for an OSError.
    """
    try:
        return action()
    except OSError as error:
        raise cannot_write(target, error.strerror or str(error)) from error


def cannot_write(target: Path, reason: str) -> UserError:
    """The sentence for a checkpoint that cannot be written."""
    return UserError(f"{target}: cannot be written ({reason}); free space or change --run_dir")


def kinds_of(pieces: Iterable[Piece]) -> dict[str, int]:
    """Bytes by kind, weights first and the others as they come."""
    sizes: dict[str, int] = {}
    for piece in pieces:
        sizes[piece.kind] = sizes.get(piece.kind, 0) + piece.bytes
    return sizes
