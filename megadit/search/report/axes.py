"""Axes of figures: where a hyperparameter's value is drawn, and how far up scores are shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megadit.search.report.importance import spans_decades
from megadit.search.wording import value_text

_TICKS = 9


@dataclass(frozen=True)
class ValueAxis:
    """Positions of the values of one key: log2 where factors matter, the value itself, or its place in a list."""

    key: str
    kind: str  # log | linear | listed
    listed: tuple[str, ...]
    low: float
    high: float
    marks: tuple[Any, ...]

    def at(self, value: Any) -> float:
        """The position of ``value``."""
        if self.kind == "listed":
            return float(self.listed.index(repr(value)))
        return math.log2(value) if self.kind == "log" else float(value)

    def value(self, position: float) -> float:
        """The value at a position of a numeric axis."""
        return 2.0**position if self.kind == "log" else position

    def ticks(self) -> tuple[list[float], list[str]]:
        """Positions and labels."""
        marks = self.marks or (_decades(self.low, self.high) if self.kind == "log" else _round(self.low, self.high))
        step = math.ceil(len(marks) / _TICKS)
        return [self.at(mark) for mark in marks[::step]], [value_text(mark) for mark in marks[::step]]

    @property
    def label(self) -> str:
        """The key, and how it is drawn."""
        return f"{self.key} (log)" if self.kind == "log" else self.key


def value_axis(key: str, kind: str, values: Sequence[Any]) -> ValueAxis:
    """An axis for these values of ``key``, which is searched as ``kind``: grid, choice, uniform or log_uniform."""
    distinct = list({repr(value): value for value in values}.values())
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return ValueAxis(key, "listed", tuple(map(repr, distinct)), 0.0, len(distinct) - 1.0, tuple(distinct))
    ordered = sorted(distinct)
    low, high = ordered[0], ordered[-1]
    if kind in ("grid", "choice"):  # its own values are its ticks
        log = spans_decades(low, high) or _geometric(ordered)
        return ValueAxis(key, "log" if log else "linear", (), float(low), float(high), tuple(ordered))
    log = kind == "log_uniform" and low > 0
    return ValueAxis(key, "log" if log else "linear", (), float(low), float(high), ())


def _geometric(values: Sequence[float]) -> bool:
    """Whether values grow by one factor, as a grid of powers does."""
    if len(values) < 3 or values[0] <= 0:
        return False
    factors = [b / a for a, b in itertools.pairwise(values)]
    return all(math.isclose(factor, factors[0], rel_tol=0.02) for factor in factors)


def _decades(low: float, high: float) -> tuple[float, ...]:
    """1, 2, 5 of each decade, or whole decades when these are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1,) if last - first > 3 else (1, 2, 5)
    found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return tuple(mark for mark in found if low * 0.999 <= mark <= high * 1.001) or (low, high)


def _round(low: float, high: float) -> tuple[float, ...]:
    """Round values between the ends."""
    span = high - low
    if span <= 0:
        return (low,)
    step = 10.0 ** math.floor(math.log10(span / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 7)
    count = math.floor(high / step + 1e-9) - math.ceil(low / step - 1e-9)
    return tuple((math.ceil(low / step - 1e-9) + i) * step for i in range(count + 1))


def score_limits(means: Sequence[float], lower_is_better: bool) -> tuple[float, float]:
    """The range of scores that a figure shows: the good part; what is far worse is drawn at the edge.

    Losses rise steeply beyond the stability edge, and a figure as high as the worst would show nothing else.
    """
    ordered = sorted(means, reverse=not lower_is_better)
    best, middle = ordered[0], ordered[len(ordered) // 2]
    reach = 3 * abs(middle - best)
    worst = ordered[-1]
    far = min(abs(worst - best), reach) or abs(best) * 0.05 or 1.0
    low, high = (best - 0.08 * far, best + 1.12 * far) if lower_is_better else (best - 1.12 * far, best + 0.08 * far)
    return low, high
