"""Steps whose loss is far above those before: an event of the metrics and a line on the console."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KIND = "loss spike"
_REMEMBERED = 100  # steps
_TIMES = 10.0  # the median
_DEVIATIONS = 30.0  # above the median: losses of few samples scatter by themselves
_OF_NORMAL = 1.4826  # standard deviations in a median absolute deviation


@dataclass(frozen=True)
class Spike:
    """The mean loss of optimizer step ``step`` (counted from 1), far above those of ``count`` steps before."""

    step: int
    loss: float
    median: float
    count: int


class SpikeDetector:
    """Holds each step's loss against the median of the steps before it.

    A spike is more than ten times that median, and more than thirty standard deviations (by the median absolute
    deviation) above it. As long as losses stay there, it is one; a level that lasts becomes the median.
    """

    def __init__(self, earlier: Iterable[float] = ()) -> None:
        self._before: deque[float] = deque(earlier, maxlen=_REMEMBERED)
        self._above = False

    def look(self, first: int, losses: Sequence[float]) -> list[Spike]:
        """Take the losses of the steps ``first``, ``first + 1``, …; returns where spikes begin."""
        found = []
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):  # of an update that fp16 skipped, or the end of the run
                continue
            if self._before:
                median = statistics.median(self._before)
                spread = _OF_NORMAL * statistics.median(abs(value - median) for value in self._before)
                above = loss > median + max((_TIMES - 1) * abs(median), _DEVIATIONS * spread)
                if above and not self._above:
                    found.append(Spike(step, loss, median, len(self._before)))
                self._above = above
            self._before.append(loss)
        return found
