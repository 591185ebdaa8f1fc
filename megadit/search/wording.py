"""Hyperparameters as people read them, the same in progress, status, verdicts, what ``apply`` prints and reports."""

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
