"""Numbers as people read them: points, counts, times, and the scale's unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megadit.search.wording import value_text

_SCALE_WORDS = {"model.width": "width", "train.global_batch": "batch", "train.steps": "steps"}


def hps_text(hps: Mapping[str, Any], between: str = ", ") -> str:
    """All values of a point: ``optim.lr = 2^-7, optim.clip.value = 1``."""
    return between.join(f"{key} = {value_text(value)}" for key, value in hps.items())


def scale_word(key: str | None) -> str:
    """What is scaled: ``width``, ``batch``, ``steps``."""
    return "scale" if key is None else _SCALE_WORDS[key]


def number_text(value: float | None, digits: int = 4) -> str:
    """A score or another measured number; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def duration_text(seconds: float) -> str:
    """``42 s``, ``13 min``, ``5.2 h``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.3g} h"


def share_text(part: float, whole: float) -> str:
    """A percentage."""
    return "–" if whole == 0 else f"{100 * part / whole:.3g} %"


def counted(count: int, noun: str) -> str:
    """``1 trial``, ``12 trials``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
