"""Windows [first, stop) of global sample numbers that a run skips, and the numbers that remain.

A run takes the numbers 0, 1, 2, ... in order, without those in a window. Everything that is drawn for a sample is
keyed by its number, so the others keep their image, noise and dropout; they come earlier by as many samples as were
left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Window = tuple[int, int]


def merge_windows(windows: Iterable[Window]) -> tuple[Window, ...]:
    """The same numbers as sorted windows that neither overlap nor touch."""
    merged: list[Window] = []
    for first, stop in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return tuple(merged)


def remaining_windows(start: int, count: int, left_out: Sequence[Window]) -> list[Window]:
    """The ``count`` numbers that follow the first ``start`` of those outside ``left_out`` (joined), as windows."""
    windows = iter(left_out)
    number, window = start, next(windows, None)
    while window is not None and window[0] <= number:
        number += window[1] - window[0]
        window = next(windows, None)
    remaining: list[Window] = []
    while count > 0:
        stop = number + count if window is None else min(number + count, window[0])
        if stop > number:
            remaining.append((number, stop))
        count -= stop - number
        if window is not None and count > 0:
            number, window = window[1], next(windows, None)
    return remaining


def subtract_windows(windows: Iterable[Window], others: Iterable[Window]) -> tuple[Window, ...]:
    """The numbers of ``windows`` that are in none of ``others``."""
    remaining = list(merge_windows(windows))
    for first, stop in merge_windows(others):
        parts = [part for low, high in remaining for part in ((low, min(high, first)), (max(low, stop), high))]
        remaining = [(low, high) for low, high in parts if low < high]
    return tuple(remaining)


def windows_before(windows: Iterable[Window], number: int) -> tuple[Window, ...]:
    """The part of the windows that lies before ``number``."""
    return tuple((first, min(stop, number)) for first, stop in merge_windows(windows) if first < number)


def format_windows(windows: Iterable[Window]) -> str:
    """E.g. ``sample 7``, ``samples 9216 to 9471`` or ``samples 0 to 3, 8``; both ends are included."""
    parts = [str(first) if stop == first + 1 else f"{first} to {stop - 1}" for first, stop in windows]
    single = len(parts) == 1 and "to" not in parts[0]
    return f"sample{'' if single else 's'} {', '.join(parts)}"


def windows_option(windows: Iterable[Window]) -> str:
    """As ``train.skip_samples`` takes them: ``[[9216, 9472]]``, here without spaces for a command line."""
    return "[" + ",".join(f"[{first},{stop}]" for first, stop in windows) + "]"
