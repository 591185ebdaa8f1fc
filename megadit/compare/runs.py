"""Two runs, or two sets of seeds, side by side: the gap of their losses, where it changes sign, and the speed-up.

The loss gap over training with its crossings is how arXiv 2505.15270 (Figures 6 and 8) shows that a searched
target overtakes another; "2.9 times faster" is the step at which one run reaches the other's final value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megadit.compare.curves import AXES, Axis, MetricCurve, common_grid, extended_grid, read_curve, smoothed
from megadit.config.loading.sources import display
from megadit.errors import UserError
from megadit.files.json_text import null_nonfinite
from megadit.transfer.ties import SAME

_SMOOTHING_SHARE = 20  # by default an average spans a twentieth of the common positions


@dataclass(frozen=True)
class MeanCurve:
    """One side's smoothed mean over its seeds on its whole length: arrays (N,); ``sd`` over seeds, nan for one."""

    at: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    @property
    def final(self) -> float:
        """The last smoothed value."""
        return float(self.mean[-1])


@dataclass(frozen=True)
class Crossing:
    """Where the smoothed gap changes sign, and the value that both sides have there; interpolated linearly."""

    at: float
    value: float
    b_below_after: bool


@dataclass(frozen=True)
class TimeToTarget:
    """When one side comes down to the other's final value: ``at`` of ``of``; a ratio above 1 is faster.

    ``at`` is None where the side never comes so low.
    """

    target: float
    of: float
    at: float | None

    @property
    def speedup(self) -> float | None:
        """How many times fewer steps (or samples)."""
        return None if self.at is None else self.of / self.at


@dataclass(frozen=True)
class Gap:
    """B − A over one axis. ``at``, ``gap`` (smoothed) and ``se`` (over seeds; nan for one): (N,) common positions."""

    axis: Axis
    a: MeanCurve
    b: MeanCurve
    at: np.ndarray
    gap: np.ndarray
    se: np.ndarray
    crossings: tuple[Crossing, ...]
    b_reaches_a: TimeToTarget
    a_reaches_b: TimeToTarget


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found; an axis on which the two never meet is missing from ``over``."""

    key: str
    smooth: int
    a: tuple[MetricCurve, ...]
    b: tuple[MetricCurve, ...]
    over: dict[Axis, Gap]

    @property
    def main(self) -> Gap:
        """The gap over steps, or over samples where the sides share no steps."""
        return self.over["steps"] if "steps" in self.over else self.over["samples"]

    @property
    def same_batch(self) -> bool:
        """Whether all runs see equally many samples a step, so that both axes tell the same."""
        return len({round(float(c.samples[-1]) / float(c.steps[-1]), 6) for c in (*self.a, *self.b)}) == 1

    @property
    def shown(self) -> list[Gap]:
        """What people are told: the gap over samples too where that is not the same."""
        return [self.main] if self.same_batch else list(self.over.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data without nan: the curves, the gap, crossings, final values and speed-ups by axis."""
        plain = {
            "key": self.key,
            "smooth": self.smooth,
            "a": [curve.name for curve in self.a],
            "b": [curve.name for curve in self.b],
            "stopped": {curve.name: curve.stopped for curve in (*self.a, *self.b) if curve.stopped},
            "over": {axis: _gap_json(gap) for axis, gap in self.over.items()},
        }
        return dict(null_nonfinite(plain))


def split_runs(text: str) -> list[Path]:
    """``"runs/a,runs/b"`` as two folders; a text that names an existing folder is that one, commas and all.

    Raises UserError where a folder with a comma in its name stands among others: which are meant is not guessed.
    """
    if Path(text).is_dir():
        return [Path(text)]
    parts = text.split(",")
    for start in range(len(parts)):
        for end in range(start + 2, len(parts) + 1):
            joined = ",".join(parts[start:end]).strip()
            if Path(joined).is_dir():
                raise UserError(
                    f"'{joined}' is a folder with a comma in its name, which parts the folders of a list; give a link "
                    "to it that has none"
                )
    return [Path(part.strip()) for part in parts if part.strip()]


def compare(a: Sequence[Path], b: Sequence[Path], key: str = "loss", smooth: int | None = None) -> Comparison:
    """Compare the runs (seeds) of ``a`` with those of ``b`` by the logged number ``key``, lower being better.

    ``smooth`` is the number of common positions that a centred average spans; None: a twentieth of them.

    Raises:
        UserError: no runs, one without metrics or without ``key``, or no position that all runs share.
    """
    if not a or not b:
        raise UserError("compare: a side names no run directory; give one, or several with commas between")
    if smooth is not None and smooth < 1:
        raise UserError(f"--smooth: {smooth} is not at least 1; 1 is no smoothing")
    left, right = (tuple(read_curve(folder, key) for folder in side) for side in (a, b))
    grids = {axis: common_grid([*left, *right], axis) for axis in AXES}
    shared = {axis: grid for axis, grid in grids.items() if len(grid)}
    if not shared:
        raise UserError(
            f"compare: no step has {key} in all runs ({_extent(left, a)}; {_extent(right, b)}); "
            "log them at intervals that meet (train.log_every, train.validate_every)"
        )
    points = smooth or max(1, len(next(iter(shared.values()))) // _SMOOTHING_SHARE)
    over = {axis: _gap(left, right, axis, grid, points) for axis, grid in shared.items()}
    return Comparison(key, points, left, right, over)


def describe(result: Comparison) -> str:
    """The comparison as lines: final values, crossings, speed-up; over samples too where the batches differ."""
    lines = [f"{result.key}, A: {_names(result.a)}; B: {_names(result.b)}; smoothed over {result.smooth} point(s)"]
    lines += [f"note: {c.name} did not complete: {c.stopped}" for c in (*result.a, *result.b) if c.stopped]
    for gap in result.shown:
        lines += _describe_gap(gap, result.key)
    if "steps" not in result.over:
        lines.append("the two sides share no steps; compared over samples only")
    return "\n".join(lines)


def _gap(a: Sequence[MetricCurve], b: Sequence[MetricCurve], axis: Axis, common: np.ndarray, points: int) -> Gap:
    raw_a, raw_b = (np.stack([curve.on(common, axis) for curve in side]) for side in (a, b))
    gap = smoothed(raw_b.mean(0) - raw_a.mean(0), points)
    level = smoothed(raw_a.mean(0), points)
    error = np.sqrt(_variance(raw_a, points) / len(raw_a) + _variance(raw_b, points) / len(raw_b))
    left, right = (_mean_curve(side, axis, common, points) for side in (a, b))
    crossings = _crossings(common, gap, level)
    return Gap(
        axis, left, right, common, gap, error, crossings, _time_to_target(right, left), _time_to_target(left, right)
    )


def _mean_curve(curves: Sequence[MetricCurve], axis: Axis, common: np.ndarray, points: int) -> MeanCurve:
    grid = extended_grid(curves, axis, common)
    raw = np.stack([curve.on(grid, axis) for curve in curves])
    return MeanCurve(grid, smoothed(raw.mean(0), points), np.sqrt(_variance(raw, points)))


def _variance(raw: np.ndarray, points: int) -> np.ndarray:
    """Variance over seeds (rows) of the smoothed values; nan for one seed."""
    if len(raw) < 2:
        return np.full(raw.shape[1], np.nan)
    variance: np.ndarray = np.stack([smoothed(row, points) for row in raw]).var(0, ddof=1)
    return variance


def _crossings(at: np.ndarray, gap: np.ndarray, level: np.ndarray) -> tuple[Crossing, ...]:
    """Changes of sign between neighbours that are finite and not zero; a stretch of zeros counts once, at its start.

    A gap that is rounding beside the level is zero.
    """
    gap = np.where(np.abs(gap) <= SAME * np.abs(level), 0.0, gap)
    crossings: list[Crossing] = []
    nonzero = [i for i in range(len(gap)) if np.isfinite(gap[i]) and gap[i] != 0.0]
    for i, j in itertools.pairwise(nonzero):
        if gap[i] * gap[j] > 0 or not np.isfinite(gap[i : j + 1]).all():
            continue
        end = i + 1  # a neighbour, or the first of the zeros between
        share = gap[i] / (gap[i] - gap[end])
        position, value = (float(x[i] + share * (x[end] - x[i])) for x in (at.astype(float), level))
        crossings.append(Crossing(position, value, bool(gap[j] < 0)))
    return tuple(crossings)


def _time_to_target(curve: MeanCurve, other: MeanCurve) -> TimeToTarget:
    """When ``who`` comes down to the final value of ``other``."""
    target, of = other.final, float(other.at[-1])
    below = np.flatnonzero(curve.mean <= target + SAME * abs(target))
    if not len(below):
        return TimeToTarget(target, of, None)
    first = int(below[0])
    high = float(curve.mean[first - 1]) if first else math.nan
    if not math.isfinite(high):
        return TimeToTarget(target, of, float(curve.at[first]))
    share = min((high - target) / (high - float(curve.mean[first])), 1.0)
    return TimeToTarget(target, of, float(curve.at[first - 1] + share * (curve.at[first] - curve.at[first - 1])))


def _extent(curves: Sequence[MetricCurve], folders: Sequence[Path]) -> str:
    curve = curves[0]
    return f"{display(folders[0])} has {len(curve.steps)} from step {curve.steps[0]} to {curve.steps[-1]}"


def _names(curves: Sequence[MetricCurve]) -> str:
    return ", ".join(curve.name for curve in curves) + (f" ({len(curves)} seeds)" if len(curves) > 1 else "")


def _describe_gap(gap: Gap, key: str) -> list[str]:
    unit = gap.axis.removesuffix("s")
    end, error = float(gap.gap[-1]), float(gap.se[-1])
    spread = f" ± {error:.2g} (standard error over seeds)" if math.isfinite(error) else ""
    lines = [
        f"final {key}: A {_value(gap.a.final)} at {unit} {_count(gap.a.at[-1])}, "
        f"B {_value(gap.b.final)} at {unit} {_count(gap.b.at[-1])}",
        f"gap B - A at {unit} {_count(gap.at[-1])}: {_value(end, '+')}{spread}",
    ]
    for crossing in gap.crossings[-8:]:
        way = "falls below" if crossing.b_below_after else "rises above"
        lines.append(f"crossing: B {way} A at {unit} {_count(crossing.at)}, {key} {_value(crossing.value)}")
    if len(gap.crossings) > 8:
        lines.append(f"(the last 8 of {len(gap.crossings)} crossings; a larger --smooth leaves fewer)")
    if not gap.crossings:
        lines.append("no crossing")
    for one, other, reach in (("B", "A", gap.b_reaches_a), ("A", "B", gap.a_reaches_b)):
        if reach.at is not None and reach.speedup is not None:
            lines.append(
                f"{one} reaches {other}'s final {key} at {unit} {_count(reach.at)}, {other} took {_count(reach.of)}: "
                f"{reach.speedup:.3g}x as fast in {gap.axis}"
            )
        elif one == "B":
            lines.append(f"{one} never reaches {other}'s final {key} of {_value(reach.target)}")
    return lines


def _value(value: float, sign: str = "") -> str:
    return f"{value:{sign}.5g}" if math.isfinite(value) else "not finite"


def _count(value: float) -> str:
    return f"{round(float(value)):,}"


def _gap_json(gap: Gap) -> dict[str, Any]:
    sides = {"a": gap.a, "b": gap.b}
    reaches = {"b_reaches_a": gap.b_reaches_a, "a_reaches_b": gap.a_reaches_b}
    final = {"at": int(gap.at[-1]), "gap": float(gap.gap[-1]), "se": float(gap.se[-1])}
    return {
        **{name: {key: values.tolist() for key, values in vars(side).items()} for name, side in sides.items()},
        "at": gap.at.tolist(),
        "gap": gap.gap.tolist(),
        "se": gap.se.tolist(),
        "crossings": [asdict(crossing) for crossing in gap.crossings],
        "final": {**final, **{name: side.final for name, side in sides.items()}},
        **{name: {**asdict(reach), "speedup": reach.speedup} for name, reach in reaches.items()},
    }
