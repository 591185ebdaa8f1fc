"""Hyperparameters and numbers as people read them, the same in progress, status, verdicts, ``apply`` and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_POWERS_UP_TO = 2.0**-3  # above it the number itself is as short: 0.25, not 2^-2


def value_text(value: Any, digits: int = 4) -> str:
    """A hyperparameter's value in at most ``digits`` digits, which a study file or an override would take.

    A small power of two is written as one (``2^-7``); so are null, true and false as in YAML.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, float):
        return str(value)
    if 0 < value <= _POWERS_UP_TO and math.log2(value).is_integer():
        return f"2^{int(math.log2(value))}"
    return f"{value:.{digits if abs(value) < 1e4 else max(digits, 6)}g}"


def point_text(hps: Mapping[str, Any]) -> str:
    """A point in one line, as overrides: ``optim.lr=2^-7 optim.clip.value=1``."""
    return " ".join(f"{key}={value_text(value, 6)}" for key, value in hps.items())


def hps_text(hps: Mapping[str, Any], between: str = ", ") -> str:
    """All values of a point: ``optim.lr = 2^-7, optim.clip.value = 1``."""
    return between.join(f"{key} = {value_text(value)}" for key, value in hps.items())


def number_text(value: float | None, spec: str = ".4g") -> str:
    """A score or another measured number in a format of Python's; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else format(value, spec)


def duration_text(seconds: float) -> str:
    """``42 s``, ``13 min``, ``5.2 h``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:,.3g} h"


def share_text(part: float, whole: float) -> str:
    """``part`` of ``whole`` as a percentage of three digits: ``12.5 %``; a dash where ``whole`` is 0."""
    return "–" if whole == 0 else f"{100 * part / whole:.3g} %"


def counted(count: int, noun: str) -> str:
    """``1 trial``, ``12 trials``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
