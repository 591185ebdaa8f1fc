"""One key of ``metrics.jsonl`` as a curve over a run's steps and samples, and the positions that curves share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megadit.config.loading.sources import display
from megadit.errors import EXIT_OK, UserError, did_you_mean
from megadit.files.json_text import parse_json
from megadit.train.run_dir import is_number, read_rows

Axis = Literal["steps", "samples"]
AXES: tuple[Axis, ...] = ("steps", "samples")


@dataclass(frozen=True)
class MetricCurve:
    """A run's values of ``key``: all arrays (N,), ascending in steps; a value that was not finite is nan.

    steps: optimizer steps, int64.  samples: images seen by then, int64; 0 where a row does not say.  stopped: why the
    run ended short of its length, empty if it did not (or still trains): the last values of a diverged run are not
    those of a finished one.
    """

    name: str
    key: str
    steps: np.ndarray
    samples: np.ndarray
    values: np.ndarray
    stopped: str = ""

    @property
    def windowed(self) -> bool:
        """Whether a value is the mean since the row before it (training losses), not one measured at its step."""
        return self.key.startswith("loss")

    def at(self, axis: Axis) -> np.ndarray:
        """Positions of the values: steps or samples seen."""
        return self.steps if axis == "steps" else self.samples

    def on(self, grid: np.ndarray, axis: Axis) -> np.ndarray:
        """The values at ``grid``, ascending positions of which this curve has every one; (len(grid),).

        Windows of a finer log are joined: the mean since the grid's previous position, so that runs that
        log at different intervals are compared over the same stretches of training.
        """
        at = self.at(axis)
        ends = np.searchsorted(at, grid)
        if not self.windowed:
            return self.values[ends]
        weights = np.diff(at, prepend=0).astype(float)
        starts = np.concatenate([[0], ends[:-1] + 1])
        upto = ends[-1] + 1
        sums = np.add.reduceat((self.values * weights)[:upto], starts)
        joined: np.ndarray = sums / np.add.reduceat(weights[:upto], starts)
        return joined


def read_curve(folder: str | Path, key: str = "loss") -> MetricCurve:
    """The values of ``key`` in the run directory ``folder``; a run killed while writing loses its torn last line.

    Raises:
        UserError: no such folder, no metrics in it, or no row with a number under ``key`` (the nearest key is named).
    """
    folder = Path(folder)
    rows = _read_rows(folder)
    # null stands in the file for a number that was not finite
    row_by_step = {int(row["step"]): row for row in rows if key in row and (row[key] is None or is_number(row[key]))}
    if not row_by_step:
        numbers = {name for row in rows for name, value in row.items() if is_number(value)}
        known = sorted(numbers - {"step", "samples_seen"})
        hint = did_you_mean(key, known, f"it has {', '.join(known) or 'no numbers at all'}")
        raise UserError(f"--key {key}: {display(folder / 'metrics.jsonl')} has no such number; {hint}")
    steps = sorted(row_by_step)
    return MetricCurve(
        run_name(folder),
        key,
        np.array(steps, dtype=np.int64),
        np.array([int(row_by_step[step].get("samples_seen") or 0) for step in steps], dtype=np.int64),
        np.array([np.nan if row_by_step[step][key] is None else float(row_by_step[step][key]) for step in steps]),
        _stopped(folder),
    )


def run_name(folder: Path) -> str:
    """What to call a run: its folder, with the study's name before a trial's number."""
    folder = folder.resolve()
    return f"{folder.parents[1].name} {folder.name}" if folder.parent.name == "trials" else folder.name


def common_grid(curves: Sequence[MetricCurve], axis: Axis) -> np.ndarray:
    """The positions, ascending and above 0, where every curve has a value; empty if there is none."""
    shared: np.ndarray = reduce(np.intersect1d, [curve.at(axis) for curve in curves])
    return shared[shared > 0]


def extended_grid(curves: Sequence[MetricCurve], axis: Axis, common: np.ndarray) -> np.ndarray:
    """``common``, and beyond its end what these curves share: at the same spacing or more, the last position always."""
    shared = common_grid(curves, axis)
    if not len(common):
        return shared
    spacing = float(np.median(np.diff(common, prepend=0)))
    grid = list(common)
    for position in shared[shared > common[-1]]:
        if position >= grid[-1] + spacing or position == shared[-1]:
            grid.append(position)
    return np.array(grid, dtype=np.int64)


def smoothed(values: np.ndarray, points: int) -> np.ndarray:
    """Centred moving average over ``points`` values, over fewer where the ends are near; nan spreads over its window.

    An even number is taken as the odd one above it.
    """
    half = points // 2
    if half == 0:
        return values.copy()
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    bad = np.concatenate([[0], np.cumsum(~np.isfinite(values))])
    sums = np.concatenate([[0.0], np.cumsum(np.where(np.isfinite(values), values, 0.0))])
    means = (sums[high] - sums[low]) / (high - low)
    return np.where(bad[high] > bad[low], np.nan, means)


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run directory's ``metrics.jsonl``, at least one. Raises UserError otherwise."""
    file = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise UserError(f"run directory: no folder {folder}; name a run directory, which holds metrics.jsonl")
    if not file.is_file():
        more = ", but trials; name one of them, e.g. trials/0000" if (folder / "trials").is_dir() else ""
        raise UserError(f"run directory: {display(folder)} holds no metrics.jsonl{more or '; has the run started?'}")
    try:
        parsed = read_rows(file)
    except OSError as error:
        raise UserError(f"run directory: cannot read {display(file)} ({error.strerror or error}); check it") from None
    if parsed.broken:
        raise UserError(
            f"run directory: line {parsed.broken[0]} of {display(file)} is not a row of metrics; take the line out"
        )
    rows = parsed.rows
    if not rows:
        raise UserError(f"run directory: {display(file)} holds no row; has the run logged a step?")
    return rows


def _stopped(folder: Path) -> str:
    """The reason in ``exit.json`` of a run that did not complete; empty where it did, or has not ended."""
    try:
        ended = parse_json((folder / "exit.json").read_bytes())
        return "" if int(ended["code"]) == EXIT_OK else str(ended["reason"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return ""
