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

from megadit.checkpoint.names import INDEX
from megadit.engine.deepspeed.partitions import Fragment
from megadit.errors import UserError
from megadit.files.file_kind import file_instead
from megadit.files.paths import is_file_name
from megadit.slices import ShardRegions

FORMAT = "megadit-checkpoint"
VERSION = 2  # 1 had neither checksums nor sizes
WEIGHTS = "weights"
FLOAT_BYTES = 4  # of a stored element
BLOCK = 1 << 20  # bytes that share a checksum
_LARGEST = 2**63 - 1
_MOST_BLOCK = 2**30  # bytes that share a checksum: a reader holds one block at a time
_COUNTERS = ("step", "samples_seen", "skipped_steps", "adam_step")


class BrokenCheckpoint(UserError):
    """A checkpoint whose files are not what was written: torn, corrupt or incomplete. An earlier one may be sound."""


@dataclass(frozen=True)
class StoredFragment:
    """Where elements [start, stop) of a flattened tensor of ``kind`` (weights, exp_avg, …) lie on the disk.

    They are counted in the parameter ``name``, or in its shard ``shard_regions`` (megadit.slices). ``crc32`` has one
    checksum per block of the fragment's bytes; None in files of format version 1.
    """

    kind: str
    name: str
    start: int
    stop: int
    file: str
    shard_regions: ShardRegions | None = None
    crc32: tuple[int, ...] | None = None

    @property
    def key(self) -> str:
        """The tensor's key in its safetensors file."""
        return f"{self.kind}/{self.name}@{self.start}"

    @property
    def bytes(self) -> int:
        """Bytes of its values in the file."""
        return (self.stop - self.start) * FLOAT_BYTES

    def to_json(self) -> dict[str, Any]:
        """A plain dict for the index, in which the regions are called boxes; what is None is left out."""
        values = {"boxes" if key == "shard_regions" else key: value for key, value in vars(self).items()}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StoredFragment:
        """What ``to_json`` gave, after its passage through JSON."""
        regions, checksums = values.get("boxes"), values.get("crc32")
        return cls(
            **{key: values[key] for key in ("kind", "name", "start", "stop", "file")},
            shard_regions=None if regions is None else tuple(tuple(map(tuple, region)) for region in regions),
            crc32=None if checksums is None else tuple(checksums),
        )


@dataclass(frozen=True)
class FileRecord:
    """What the index says of a file: its size, and the checksum of its safetensors header or, elsewhere, of all."""

    bytes: int
    crc32: int


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
    """What ``index.json`` says. ``files`` is empty and fragments have no checksums in version 1."""

    parameters: dict[str, list[int]]
    fragments: list[StoredFragment]
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
            "pieces": [fragment.to_json() for fragment in self.fragments],
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
                return cls(
                    body["parameters"],
                    [StoredFragment.from_json(fragment) for fragment in body["pieces"]],
                    {},
                    version=1,
                )
            if name == FORMAT and version == VERSION:
                expected = body.pop("crc32")
                if expected != _sum_of(body):
                    raise ValueError("its checksum is wrong")
                check_index(body)
                files = {key: FileRecord(**record) for key, record in body["files"].items()}
                fragments = [StoredFragment.from_json(fragment) for fragment in body["pieces"]]
                return cls(body["parameters"], fragments, files, body["block"], plugins=body.get("plugins", ()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BrokenCheckpoint(
                f"checkpoint {folder}: its index cannot be read ({json_problem(error, folder / INDEX)}); use an "
                "earlier one"
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
    """``action()``, whose OSError becomes the sentence of ``cannot_write``.

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


def kinds_of(fragments: Iterable[StoredFragment]) -> dict[str, int]:
    """Bytes by kind, weights first and the others as they come."""
    sizes: dict[str, int] = {}
    for fragment in fragments:
        sizes[fragment.kind] = sizes.get(fragment.kind, 0) + fragment.bytes
    return sizes


def check_index(body: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, unless the fragments of ``body`` lie in its parameters and its folder."""
    parameters, fragments, files = body["parameters"], body["pieces"], body.get("files", {})
    if not isinstance(parameters, dict) or not isinstance(fragments, list) or not isinstance(files, dict):
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
    for number, fragment in enumerate(fragments):
        problem = _piece_problem(fragment, parameters)
        if problem:
            raise ValueError(f"piece {number} {problem}")


def _piece_problem(fragment: Any, parameters: Mapping[str, Any]) -> str | None:
    if not isinstance(fragment, dict) or not all(
        isinstance(fragment.get(key), str) for key in ("kind", "name", "file")
    ):
        return "has no kind, name or file"
    if fragment["name"] not in parameters:
        return f"is of '{fragment['name'][:60]}', which is no parameter"
    if not is_file_name(fragment["file"]):
        return f"lies in '{fragment['file'][:60]}', which is no name of a file in this folder"
    shape, shard_regions, sums = parameters[fragment["name"]], fragment.get("boxes"), fragment.get("crc32", [])
    size = math.prod(shape)
    if shard_regions is not None:
        if not isinstance(shard_regions, list) or not all(_is_box(box, shape) for box in shard_regions):
            return "has boxes that do not lie in its parameter"
        size = sum(math.prod(high - low for low, high in box) for box in shard_regions)
    start: Any = fragment.get("start")
    stop: Any = fragment.get("stop")
    if not (_is_count(start) and _is_count(stop) and start <= stop <= size):
        return f"has the elements {str(start)[:30]} to {str(stop)[:30]} of {size}"
    if not isinstance(sums, list) or not all(map(_is_count, sums)):
        return "has checksums that are no numbers"
    return None


def json_problem(error: Exception, file: Path | None = None) -> str:
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
