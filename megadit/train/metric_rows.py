"""Rows of ``metrics.jsonl``, as a crash, a full disk, an editor or a bad copy left the file. Needs no torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadit.files.json_text import JsonError, parse_json

_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class MetricRows:
    """rows: those that are such, each with a whole ``step``.  lines: the bytes of each.  broken: numbers of the others.

    ``torn``: the last line is not whole, as a killed run leaves it, or one that is still writing; it is not among
    ``broken``.
    """

    rows: list[dict[str, Any]]
    lines: list[bytes]
    broken: tuple[int, ...]
    torn: bool


def read_rows(file: Path) -> MetricRows:
    """The rows of a file; none where there is no file. Raises OSError where it cannot be read."""
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return MetricRows([], [], (), False)
    rows, whole, broken = [], [], []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
            whole.append(line)
        elif line.strip():
            broken.append(number)
    torn = bool(broken) and not any(line.strip() for line in lines[broken[-1] :])
    return MetricRows(rows, whole, tuple(broken[:-1] if torn else broken), torn)


def is_number(value: Any) -> bool:
    """Whether it is a number that a float holds; the metrics have null for one that was not finite."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line.decode("utf-8", "replace"))
    except JsonError:
        return None
    whole = isinstance(row, dict) and all(_is_whole(row.get(key, 0)) for key in ("step", "samples_seen"))
    if not whole or "step" not in row:
        return None
    losses = (key for key in row if key == "val_loss" or (key.startswith("loss") and key != "loss_bins"))
    return row if all(row[key] is None or is_number(row[key]) for key in losses) else None


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
