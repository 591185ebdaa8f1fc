"""What a conversion was asked for, beside its formats and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megadit.config import RunConfig


@dataclass(frozen=True)
class Request:
    """``config`` is the run's, where one was given. ``ema`` names other weights of the source than the usual ones.

    ``hints`` say what an official checkpoint's weights cannot. ``overrides`` change the configuration that a source
    without one gets. ``allow_inexact`` lets a model go to or come from a class that computes something else.
    """

    config: RunConfig | None = None
    ema: str | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    allow_inexact: bool = False
