"""Whether ``index.json`` and ``state.json`` hold what a checkpoint's writer puts there, before anything relies on it.

Checksums find what disks and copies do to a file. They do not find what an editor, another program or version 1, which
had none, left there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadit.files.file_kind import file_instead
from megadit.files.paths import is_file_name

FLOAT_BYTES = 4  # of a stored element
_LARGEST = 2**63 - 1
_MOST_BLOCK = 2**30  # bytes that share a checksum: a reader holds one block at a time
_COUNTERS = ("step", "samples_seen", "skipped_steps", "adam_step")


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


def _is_box(box: Any, shape: list[int]) -> bool:
    return (
        isinstance(box, list)
        and len(box) == len(shape)
        and all(
            isinstance(side, list) and len(side) == 2 and all(map(_is_count, side)) and side[0] <= side[1] <= size
            for side, size in zip(box, shape, strict=True)
        )
    )
