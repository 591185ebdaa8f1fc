"""What a conversion was asked for, and the place of what it makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadit.config import RunConfig
from megadit.errors import UserError
from megadit.files.ownership import acquire_folder

MEGADIT = "megadit"
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
    if source_format == target_format == MEGADIT:
        raise UserError("--to: megadit is what IN is already; copy it, or start from its weights with train.init_from")
    if request.ema is not None and source_format not in (MEGADIT, *_NAMED) and not official:
        raise UserError(f"--ema: {request.ema} is asked for, but {source_format} holds no averages; leave it out")
    if request.hints and not official:
        hint = next(iter(request.hints))
        raise UserError(f"--hint {hint}: is for official checkpoints, and --from is {source_format}; leave it out")
    if not source.exists():
        raise UserError(f"IN: '{source}' does not exist; give the folder or file to convert")
    check_target_is_free(target)


def check_target_is_free(target: Path) -> None:
    """Raise UserError unless nothing, or an empty folder, is at ``target``."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"OUT: '{target}' exists already; choose another name, or take it away first")


@contextmanager
def new_target(target: Path) -> Iterator[Path]:
    """A name beside ``target`` to write to, which becomes ``target`` when all went well and vanishes otherwise.

    Raises:
        UserError: ``target`` holds something already, cannot be written, or another process is writing it.
    """
    check_target_is_free(target)
    temporary = target.with_name(f".tmp-{target.name}")  # a writer goes by the ending
    with acquire_folder(target.parent, "converting", "OUT", name=target.name) as ownership:
        check_target_is_free(target)  # which another process may just have written
        try:
            _remove(temporary)
            yield temporary
            ownership.check()
            if target.is_dir():
                target.rmdir()
            temporary.rename(target)
        except OSError as error:
            raise UserError(
                f"OUT: '{target}' cannot be written ({error.strerror or error}); free space, or choose another place"
            ) from error
        finally:
            if ownership.holds():
                _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
