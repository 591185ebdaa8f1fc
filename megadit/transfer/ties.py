"""Scores that differ by rounding are the same score: every comparison of scores that decides something is made here.

The loss of the same run differs in its last bits from one CPU or library to another, and the mean of the same scores
with the order in which they are added; a table's regret of .505 - .5 is not .01 · .5 in binary. What is chosen, ranked
or judged must not depend on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

SAME = 2.0**-20  # of a score's size: eight times float32's epsilon, in which losses are computed
SAME_HP = 1e-6  # octaves: of a hyperparameter's log2, whose values programs write with 7 digits and more

T = TypeVar("T")


def at_most(value: float, bound: float, size: float) -> bool:
    """Whether ``value`` is below ``bound``, or above by no more than rounding of scores of this ``size``."""
    return value <= bound + SAME * abs(size)


def difference(a: float, b: float) -> float:
    """a - b; exactly 0 where the two are the same score."""
    return 0.0 if abs(a - b) <= SAME * max(abs(a), abs(b)) else a - b


def lowest(items: Iterable[T], key: Callable[[T], float]) -> T:
    """The first of the items whose key is the same score as the lowest one's; keys that are infinite come last."""
    listed = list(items)
    keys = [key(item) for item in listed]
    least = min(keys)
    return next(
        item for item, value in zip(listed, keys, strict=True) if value <= least or at_most(value, least, least)
    )


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 0 up, (N,); the same scores share their mean rank, as do infinite ones of one sign."""
    from scipy.stats import rankdata

    first = _first_of_same(values, lambda a, b: a == b or (math.isfinite(a - b) and difference(a, b) == 0.0))
    return np.asarray(rankdata([first[float(value)] for value in values])) - 1.0


def same_hps(values: Iterable[float]) -> dict[float, float]:
    """Of log2 values that differ by rounding, the smallest stands for all: value -> the one that stands for it."""
    return _first_of_same(values, lambda a, b: a - b <= SAME_HP)


def _first_of_same(values: Iterable[float], same: Callable[[float, float], bool]) -> dict[float, float]:
    """Each value -> the smallest of its group; values ascend, and one that is not the ``same`` opens the next group."""
    firsts: dict[float, float] = {}
    first = math.nan
    for value in sorted({float(value) for value in values}):
        first = value if not firsts or not same(value, first) else first
        firsts[value] = first
    return firsts


def nearest(values: Iterable[float], log2: float | None) -> float | None:
    """Of the positive ``values`` as they were written, the one whose log2 is nearest to ``log2``."""
    return None if log2 is None else min(values, key=lambda value: abs(math.log2(value) - log2))
