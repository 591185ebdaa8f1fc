"""Which sizes of a coordinate check are rounding: the one place that says "not reached yet".

Behind a zero readout and zero gates a layer gets no gradient at first. What is read of it then is zero, or what two
passes of the same weights differ by: the last bits of this machine's matrix products. A slope through such sizes tells
of the library, not of the model. So a size is *not reached yet* as long as it, and each one before it, is

- zero;
- below ``ROUNDING`` of the sizes that the same quantity of the same module has within the next ``WINDOW`` steps
  (the median over widths and seeds, so that one width that dies or blows up decides nothing for the others); or
- below ``FLOAT32`` at a step at which other widths read zero: the rounding of recordings made in float32.

A quantity is judged from the first step on at which all widths and seeds that ever reach it have done so. A width that
never does while others do counts as zero: it is dead, which is a fault. If none does, the quantity is never reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

ROUNDING = 1e-4  # measured: float32 noise of 6e-6 of the later sizes at most; real first steps not below 7e-3 of them
WINDOW = 4  # steps that the gradient may need to reach a layer, and one more; real sizes grow by 5^3 in that time
FLOAT32 = 2.0**-20  # eight times float32's epsilon

Series = tuple[int, int]  # width and seed


Sizes = tuple[tuple[int, float], ...]  # (width, mean size over seeds), widths ascending


def reached_sizes(readings: Mapping[Series, Sequence[float]]) -> list[Sizes | None]:
    """The judged sizes of one quantity of one module by step, None where it is not reached yet.

    Args:
        readings: the quantity's sizes by step, of every width and seed.

    Raises:
        ValueError: the widths and seeds were not read at equally many steps.
    """
    counts = {len(sizes) for sizes in readings.values()}
    if len(counts) != 1:
        raise ValueError(f"coordinates: widths and seeds were read at different numbers of steps ({sorted(counts)})")
    count = counts.pop()
    bounds = [_bound(readings, step) for step in range(count)]
    begins = {series: _begin(sizes, bounds) for series, sizes in readings.items()}
    first = max((begin for begin in begins.values() if begin < count), default=count)
    dead = {series for series, begin in begins.items() if begin == count}
    return [None if step < first else _means(readings, step, dead) for step in range(count)]


def _bound(readings: Mapping[Series, Sequence[float]], step: int) -> float:
    """The size up to which one of this step is rounding."""
    later = [max(filter(math.isfinite, sizes[step : step + WINDOW + 1]), default=0.0) for sizes in readings.values()]
    some_zero = any(sizes[step] == 0.0 for sizes in readings.values())
    return max(ROUNDING * median(later), FLOAT32 if some_zero else 0.0)


def _begin(sizes: Sequence[float], bounds: Sequence[float]) -> int:
    """The first step that is above rounding; the number of steps if none is. What is not finite is above."""
    return next((i for i, (size, bound) in enumerate(zip(sizes, bounds, strict=True)) if not size <= bound), len(sizes))


def _means(readings: Mapping[Series, Sequence[float]], step: int, dead: set[Series]) -> Sizes:
    """Means over seeds; zero at a width of which any seed is dead."""
    by_width: dict[int, list[float]] = {}
    for (width, _), sizes in sorted(readings.items()):
        by_width.setdefault(width, []).append(sizes[step])
    widths_dead = {width for width, _ in dead}
    return tuple((w, 0.0 if w in widths_dead else sum(sizes) / len(sizes)) for w, sizes in by_width.items())
