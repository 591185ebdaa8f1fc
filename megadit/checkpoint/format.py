"""What a checkpoint is made of: positions, the index and its checksums. See docs/checkpoints.md.

``checkpoints/step-XXXXXXXX/`` holds one safetensors file per writing rank, ``state.json`` (step, counters, loss
scale, group table, config) and ``index.json``: which file holds which index range of which parameter, its checksums,
and the sizes of all files. Nothing in it depends on the number of ranks or on the ZeRO stage.

Checksums find what disks and copies do to a file. They do not find what an editor, another program or version 1, which
had none, left there: ``check_index`` and ``check_state`` look at the values before anything relies on them.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megadit.checkpoint.io import BLOCK, BrokenCheckpoint, FileRecord, Piece
from megadit.checkpoint.names import INDEX
from megadit.engine.deepspeed.partitions import Fragment
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.files.paths import is_file_name

FORMAT = "megadit-checkpoint"
VERSION = 2  # 1 had neither checksums nor sizes
WEIGHTS = "weights"
FLOAT_BYTES = 4  # of a stored element
_LARGEST = 2**63 - 1
_MOST_BLOCK = 2**30  # bytes that share a checksum: a reader holds one block at a time
_COUNTERS = ("step", "samples_seen", "skipped_steps", "adam_step")


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
    plugins: Sequence[Mapping[str, str]] = ()  # without which its configuration and model mean nothing

    def to_json(self) -> str:
        """The file's text; its last key is the checksum of the others."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "block": self.block,
            "files": {name: asdict(record) for name, record in self.files.items()},
            "parameters": self.parameters,
            "pieces": [piece.to_json() for piece in self.pieces],
            **({"plugins": list(self.plugins)} if self.plugins else {}),
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
                return cls(body["parameters"], pieces, files, body["block"], plugins=body.get("plugins", ()))
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


def check_index(body: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, unless the pieces of ``body`` lie in its parameters and its folder."""
    parameters, pieces, files = body["parameters"], body["pieces"], body.get("files", {})
    if not isinstance(parameters, dict) or not isinstance(pieces, list) or not isinstance(files, dict):
        raise ValueError("its parameters, pieces or files are no lists of them")
    for name, shape in parameters.items():
        if not isinstance(shape, list) or not all(map(_is_count, shape)) or math.prod(shape) > _LARGEST:
            raise ValueError(f"the shape of '{name}' is {str(shape)[:60]}")
    for name, record in files.items():
        if not is_file_name(name) or not isinstance(record, dict) or record.keys() != {"bytes", "crc32"}:
            raise ValueError(f"what it says of the file '{name}' is {str(record)[:60]}")
        if not all(map(_is_count, record.values())):
            raise ValueError(f"size or checksum of '{name}' is no number")
    if not _is_count(body.get("block", 1)) or not 0 < body.get("block", 1) <= _MOST_BLOCK:
        raise ValueError(f"block is {str(body['block'])[:60]}")
    plugins = body.get("plugins", [])
    if not isinstance(plugins, list) or not all(map(_is_plugin, plugins)):
        raise ValueError(f"plugins is {str(plugins)[:60]}")
    for number, piece in enumerate(pieces):
        problem = _piece_problem(piece, parameters)
        if problem:
            raise ValueError(f"piece {number} {problem}")


def _piece_problem(piece: Any, parameters: Mapping[str, Any]) -> str | None:
    if not isinstance(piece, dict) or not all(isinstance(piece.get(key), str) for key in ("kind", "name", "file")):
        return "has no kind, name or file"
    if piece["name"] not in parameters:
        return f"is of '{piece['name'][:60]}', which is no parameter"
    if not is_file_name(piece["file"]):
        return f"lies in '{piece['file'][:60]}', which is no name of a file in this folder"
    shape, boxes, sums = parameters[piece["name"]], piece.get("boxes"), piece.get("crc32", [])
    size = math.prod(shape)
    if boxes is not None:
        if not isinstance(boxes, list) or not all(_is_box(box, shape) for box in boxes):
            return "has boxes that do not lie in its parameter"
        size = sum(math.prod(high - low for low, high in box) for box in boxes)
    start: Any = piece.get("start")
    stop: Any = piece.get("stop")
    if not (_is_count(start) and _is_count(stop) and start <= stop <= size):
        return f"has the elements {str(start)[:30]} to {str(stop)[:30]} of {size}"
    if not isinstance(sums, list) or not all(map(_is_count, sums)):
        return "has checksums that are no numbers"
    return None


def told(error: Exception, file: Path | None = None) -> str:
    """What was wrong with a JSON file, for people: what it is instead, or why it cannot be read."""
    other = None if file is None else file_instead(file, "json", "text")
    if other is not None:
        return other
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def check_state(state: Any) -> None:
    """Raise ValueError, naming the key, unless ``state`` holds counters, a configuration and what else it may."""
    if not isinstance(state, dict):
        raise ValueError("it holds no keys and values")
    for key in _COUNTERS:
        if not _is_count(state[key]):
            raise ValueError(f"{key} is {str(state[key])[:60]}")
    config = state["config"]
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("model", "train", "data")):
        raise ValueError("config has no model, train and data")
    for key in ("loss_scale", "layout", "samples", "data"):
        if not isinstance(state.get(key), dict | None):
            raise ValueError(f"{key} is {str(state[key])[:60]}")
    layout, scale, groups = state.get("layout") or {}, state.get("loss_scale") or {}, state.get("groups", [])
    if not all(_is_count(value) and value for key, value in layout.items() if key != "zero_stage"):
        raise ValueError(f"layout is {str(layout)[:60]}")
    if not all(isinstance(value, int | float | None) for value in scale.values()):
        raise ValueError(f"loss_scale is {str(scale)[:60]}")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("groups is no list of groups")
    if not isinstance(state.get("data_changes", []), list):
        raise ValueError("data_changes is no list")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_plugin(value: Any) -> bool:
    keys = {"name", "version", "sha256"}
    return isinstance(value, dict) and value.keys() == keys and all(isinstance(text, str) for text in value.values())


def _is_box(box: Any, shape: list[int]) -> bool:
    return (
        isinstance(box, list)
        and len(box) == len(shape)
        and all(
            isinstance(side, list) and len(side) == 2 and all(map(_is_count, side)) and side[0] <= side[1] <= size
            for side, size in zip(box, shape, strict=True)
        )
    )
