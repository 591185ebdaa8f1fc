"""What a conversion was asked for, beside its formats and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadit.config import RunConfig
from megadit.errors import UserError

OWN = "megadit"
_NAMED = ("safetensors", "fp32-state-dict")  # formats that may hold averages under names of their own


@dataclass(frozen=True)
class Request:
    """``config`` is the run's, where one was given. ``ema`` names other weights of the source than the usual ones.

    ``hints`` say what an official checkpoint's weights cannot. ``overrides`` change the configuration that a source
    without one gets. ``allow_inexact`` lets a model go to or come from a class that computes something else,
    ``allow_nonfinite`` weights that are NaN, infinite or beyond float32 be converted.
    """

    config: RunConfig | None = None
    ema: str | None = None
    hints: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    allow_inexact: bool = False
    allow_nonfinite: bool = False


def check_request(source_format: str, target_format: str, source: Path, target: Path, request: Request) -> None:
    """Refuse, before anything is read, what does not go together, or is not there. Raises UserError."""
    official = source_format.startswith("official-")
    if source_format == target_format == OWN:
        raise UserError("--to: megadit is what IN is already; copy it, or start from its weights with train.init_from")
    if request.ema is not None and source_format not in (OWN, *_NAMED) and not official:
        raise UserError(f"--ema: {request.ema} is asked for, but {source_format} holds no averages; leave it out")
    if request.hints and not official:
        hint = next(iter(request.hints))
        raise UserError(f"--hint {hint}: is for official checkpoints, and --from is {source_format}; leave it out")
    if not source.exists():
        raise UserError(f"IN: '{source}' does not exist; give the folder or file to convert")
    check_free(target)


def check_free(target: Path) -> None:
    """Raise UserError unless nothing, or an empty folder, is at ``target``."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"OUT: '{target}' exists already; choose another name, or take it away first")
